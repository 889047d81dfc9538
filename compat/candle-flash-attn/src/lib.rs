//! The functions of candle-flash-attn 0.11.1, served by FlashInfer's prebuilt
//! kernels: see `flashinfer_rs::candle`, and this repository's `docs/candle.md`.

pub use flashinfer_rs::candle::{
    flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
    flash_attn_windowed,
};

/// Does not build unless each function takes what it takes in candle-flash-attn
/// 0.11.1, in that order.
macro_rules! signatures {
    ($($name:ident($($argument:ty),*);)*) => {
        $(const _: fn($($argument),*) -> candle::Result<candle::Tensor> = $name;)*
    };
}

/// The names for it.
mod signatures {
    use super::*;
    use candle::Tensor;

    type Window = Option<usize>;

    signatures! {
        flash_attn(&Tensor, &Tensor, &Tensor, f32, bool);
        flash_attn_windowed(&Tensor, &Tensor, &Tensor, f32, Window, Window);
        flash_attn_alibi(&Tensor, &Tensor, &Tensor, &Tensor, f32, bool);
        flash_attn_alibi_windowed(&Tensor, &Tensor, &Tensor, &Tensor, f32, Window, Window);
        flash_attn_alibi_windowed_softcap(
            &Tensor, &Tensor, &Tensor, Option<&Tensor>, f32, Window, Window, f32
        );
        flash_attn_varlen(&Tensor, &Tensor, &Tensor, &Tensor, &Tensor, usize, usize, f32, bool);
        flash_attn_varlen_windowed(
            &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, usize, usize, f32, Window, Window
        );
        flash_attn_varlen_paged_windowed(
            &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, Option<&Tensor>, usize, usize, f32,
            Window, Window, usize, Option<f32>
        );
        flash_attn_varlen_alibi(
            &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, usize, usize, f32, bool
        );
        flash_attn_varlen_alibi_windowed(
            &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, &Tensor, usize, usize, f32, Window, Window
        );
        flash_attn_varlen_alibi_windowed_softcap(
            &Tensor, &Tensor, &Tensor, Option<&Tensor>, &Tensor, &Tensor, usize, usize, f32, Window, Window, f32
        );
    }
}
