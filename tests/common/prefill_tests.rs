//! The tests that prefill over pages and over ragged keys have in common.

mod masks;
mod options;
mod plans;
mod shapes;

use flashinfer_rs::{
    FlashInferError, PageTable,
    attention::{Backend, BatchPrefill, Heads, Mask, PlanOptions, RunOptions, Workspace},
    gpu::TensorExt,
    indices::{ItemIndices, ItemTable, MaskIndices, MaskTable, RaggedIndices, RaggedTable},
    kv::KvLayout,
};
use float8::F8E4M3;
use half::{bf16, f16};

use super::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    attention::{capture, refuse_queries_and_outputs},
    cache::{LAYOUTS, table_among},
    prefill::{
        Captured, Case, KeyTable, Kind, Kv, Masked, On, Problem, Tables, check_all, check_problem, prefill_of,
    },
    refused,
};

/// The tests of a kind for both backends, each a method of [`On`]: those that
/// the kinds share, and those that are named.
#[macro_export]
macro_rules! prefill_tests {
    (@call $method:ident [$($ty:ty)?] [$($argument:expr),*]) => {
        ON.$method$(::<$ty>)?($($argument),*)
    };
    (@on $module:ident $backend:ident $kind:ident $($name:ident $method:ident $ty:tt $arguments:tt)*) => {
        mod $module {
            use super::*;
            const ON: On = On { kind: Kind::$kind, backend: Backend::$backend };
            $(#[test]
            fn $name() {
                $crate::prefill_tests!(@call $method $ty $arguments);
            })*
        }
    };
    (@all $kind:ident: $($name:ident: $method:ident $(::<$ty:ty>)? ($($argument:expr),*);)*) => {
        $crate::prefill_tests!(@on fa2 Fa2 $kind $($name $method [$($ty)?] [$($argument),*])*);
        $crate::prefill_tests!(@on fa3 Fa3 $kind $($name $method [$($ty)?] [$($argument),*])*);
    };
    (@fa2 $kind:ident: $($name:ident: $method:ident $(::<$ty:ty>)? ($($argument:expr),*);)*) => {
        $crate::prefill_tests!(@on fa2_only Fa2 $kind $($name $method [$($ty)?] [$($argument),*])*);
    };
    ($kind:ident: $($own:ident),*) => {
        $crate::prefill_tests! { @fa2 $kind:
            f16_256: shapes::<f16>(256);
            bf16_256: shapes::<bf16>(256);
            logits_soft_cap: logits_soft_cap();
            sliding_window_and_soft_cap: sliding_window_and_soft_cap();
            f16_over_e4m3: e4m3::<f16>();
            bf16_over_e4m3: e4m3::<bf16>();
            f16_custom_masks: custom_masks::<f16>();
            bf16_custom_masks: custom_masks::<bf16>();
            long_custom_mask: long_custom_mask();
            custom_mask_and_window: custom_mask_and_window();
            graph_replay_of_custom_masks: graph_replay_of_custom_masks();
            alibi: alibi();
        }
        $crate::prefill_tests! { @all $kind:
            f16_64: shapes::<f16>(64);
            f16_128: shapes::<f16>(128);
            bf16_64: shapes::<bf16>(64);
            bf16_128: shapes::<bf16>(128);
            f16_tiles: tiles::<f16>();
            bf16_tiles: tiles::<bf16>();
            random_batches_64: random_batches(64);
            random_batches_128: random_batches(128);
            chunked_prefill: chunked_prefill();
            long_keys: long_keys();
            keys_of_128k: keys_of_128k();
            many_requests: many_requests();
            batch_of_1024: batch_of_1024();
            no_keys_for_some: no_keys_for_some();
            no_keys_at_all: no_keys_at_all();
            more_queries_than_keys: more_queries_than_keys();
            lse_and_pdl_change_nothing: lse_and_pdl_change_nothing();
            sm_scale: sm_scale();
            sm_scale_that_unmasks: sm_scale_that_unmasks();
            sliding_window: sliding_window();
            sliding_window_without_causal: sliding_window_without_causal();
            strided: strided();
            one_head_with_an_uneven_stride: one_head_with_an_uneven_stride();
            query_heads_that_repeat: query_heads_that_repeat();
            nothing_to_do: nothing_to_do();
            steps_share_a_workspace: steps_share_a_workspace();
            f16_graph_replay: graph_replay::<f16>();
            bf16_graph_replay: graph_replay::<bf16>();
            graph_replay_of_windows: graph_replay_of_windows();
            can_replay: can_replay();
            two_streams_at_once: two_streams_at_once();
            runs_agree: runs_agree();
            attention_sinks: attention_sinks();
            attention_sinks_and_window: attention_sinks_and_window();
            v_scale_without_quantization: v_scale_without_quantization();
            wrong_masks: wrong_masks();
            wrong_slopes_and_sinks: wrong_slopes_and_sinks();
            wrong_queries_and_outputs: wrong_queries_and_outputs();
            wrong_plans: wrong_plans();
            $($own: $own();)*
        }
    };
}

impl On {
    pub fn case(self) -> Case {
        Case {
            on: self,
            requests: vec![(1, 1), (5, 20), (0, 7), (33, 33), (16, 64), (0, 0), (2, 131)],
            causal: true,
            page_size: 16,
            kv_heads: 2,
            group: 4,
            head_dim_qk: 128,
            head_dim_vo: 128,
            layout: KvLayout::Nhd,
            joined: false,
            window_left: None,
            soft_cap: None,
            sm_scale: None,
            masked: Masked::No,
            sinks: false,
            alibi: false,
            kv_scales: None,
        }
    }

    /// A case with and without causal masking.
    fn both(case: Case) -> [Case; 2] {
        [true, false].map(|causal| Case { causal, ..case.clone() })
    }

    /// A case in every layout, storage and page size; ragged keys have one, and
    /// those of one request only layouts.
    fn stored(self, case: Case) -> Vec<Case> {
        match self.kind {
            Kind::Ragged => return vec![case],
            Kind::Single => return LAYOUTS.map(|layout| Case { layout, ..case.clone() }).into(),
            Kind::Paged => {}
        }
        let mut cases = Vec::new();
        for page_size in [1, 16, 64] {
            for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                cases.push(Case { page_size, layout, joined, ..case.clone() });
            }
        }
        cases
    }
}
