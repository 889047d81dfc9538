//! Products of one row by weights of `e4m3` (`gemv.cu`). They read the weight once, as fast as
//! the memory is, and leave the row as it is: it is not rounded to 8 bits.

use std::{ptr, sync::Arc};

use cudarc::{
    driver::{CudaFunction, CudaStream, LaunchConfig, PushKernelArg},
    nvrtc::Ptx,
};
use flashinfer_rs::{DType, Device, TensorMut, TensorRef};

use crate::{
    Result,
    backend::matmul::{Added, Product, Weight},
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Rows of the weight that a block reads: two for each warp.
const ROWS: usize = 2 * THREADS as usize / 32;
/// Numbers that a thread reads at once.
const VECTOR: usize = 16;

/// The kernel of one element type, on one stream.
pub struct Gemv {
    cuda: Arc<CudaStream>,
    dtype: DType,
    kernel: CudaFunction,
}

impl Gemv {
    /// Has it compiled for a row and results of `f16` or `bf16`.
    ///
    /// # Errors
    /// The GPU has no 8-bit floats: its compute capability is below 8.9.
    pub fn new(cuda: &Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let module = cuda.context().load_module(Ptx::from_src(include_str!("gemv.ptx")))?;
        Ok(Self { cuda: cuda.clone(), dtype, kernel: module.load_function(&format!("gemv_{dtype}"))? })
    }

    /// As [`Matmul::run`](crate::backend::matmul::Matmul::run) of a product of one row, which is
    /// of the kernel's type, as the results are.
    pub fn run(
        &self,
        product: &Product,
        out: &mut TensorMut<'_>,
        x: &TensorRef<'_>,
        weight: &Weight<'_>,
    ) -> Result<()> {
        let Product { rows, input, output, factor, added, .. } = *product;
        let device = Device::Cuda(self.cuda.context().ordinal() as u32);
        let check = |name, tensor: &TensorRef<'_>, dtype, numel| {
            product.check_tensor(name, tensor, dtype, numel, device)
        };
        let (Some(scales), 1, true) = (weight.matrix.scales, rows, input.is_multiple_of(VECTOR)) else {
            return Err(format!("{product:?} is not one of a row by a weight with scales").into());
        };
        if weight.bias.is_some() != (added == Added::Bias) {
            return Err(format!("the bias of {product:?} is {:?}", weight.bias).into());
        }
        check("out", &out.as_ref(), self.dtype, output)?;
        check("x", x, self.dtype, input)?;
        check("weight", &weight.matrix.numbers, DType::E4M3, input * output)?;
        check("scales", &scales, DType::F32, output)?;
        weight.bias.iter().try_for_each(|bias| check("bias", bias, self.dtype, output))?;
        let bias = weight.bias.map_or(ptr::null_mut(), |bias| bias.data_ptr());
        let data = [out.data_ptr(), weight.matrix.numbers.data_ptr(), scales.data_ptr(), x.data_ptr(), bias];
        let data = data.map(|data| data as u64);
        let sizes = [u32::try_from(output)?, u32::try_from(input / VECTOR)?];
        let added = match added {
            Added::Nothing => 0u32,
            Added::Bias => 1,
            Added::Output => 2,
        };
        let blocks = u32::try_from(output.div_ceil(ROWS))?;
        let shape =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.cuda.launch_builder(&self.kernel);
        for address in &data {
            launch.arg(address);
        }
        for size in &sizes {
            launch.arg(size);
        }
        launch.arg(&factor).arg(&added);
        // SAFETY: the kernel takes five addresses, rows of the weight, a width in sixteens, a
        // factor and what is added. All that it reads and writes was checked to be there; without
        // a bias it reads none.
        unsafe { launch.launch(shape)? };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use flashinfer_rs::artifacts::Digest;

    /// The PTX is what `src/ops/ptx.sh` made of the source beside it.
    #[test]
    fn ptx_is_made_of_its_source() {
        let digest = Digest::of(include_bytes!("gemv.cu"));
        let line = format!("// Made of gemv.cu by ptx.sh: sha256 {digest}");
        assert_eq!(include_str!("gemv.ptx").lines().next(), Some(line.as_str()), "run src/ops/ptx.sh");
    }
}
