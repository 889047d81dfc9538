//! The functions of modules of batch prefill, as versions of FlashInfer have them.
//!
//! Source: `csrc/batch_prefill_jit_binding.cu`, `csrc/batch_prefill_sm90_jit_binding.cu`, and
//! `flashinfer/jit/attention/` for what follows the arguments that all modules share.

use crate::ffi::{Kernel, Signature, kernels};

kernels! {
    pub(super) struct Fa2Plan = "plan" {
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len_arr: Tensor,
        total_num_rows: Int, batch_size: Int, num_qo_heads: Int, num_kv_heads: Int, page_size: Int,
        enable_cuda_graph: Bool, head_dim_qk: Int, head_dim_vo: Int, causal: Bool, window_left: Int,
        fixed_split_size: Int, disable_split_kv: Bool, num_colocated_ctas: Int,
        uniform_q_len: Int, fixed_uniform_q_len: Bool,
    } {
        "0.6.13": (
            float_workspace, int_workspace, pinned_int_workspace, qo_indptr, kv_indptr, kv_len_arr,
            total_num_rows, batch_size, num_qo_heads, num_kv_heads, page_size,
            enable_cuda_graph, head_dim_qk, head_dim_vo, causal, window_left,
            fixed_split_size, disable_split_kv, num_colocated_ctas,
        ) -> "Array<int>";
        "0.6.16": (
            float_workspace, int_workspace, pinned_int_workspace, qo_indptr, kv_indptr, kv_len_arr,
            total_num_rows, batch_size, num_qo_heads, num_kv_heads, page_size,
            enable_cuda_graph, head_dim_qk, head_dim_vo, causal, window_left,
            fixed_split_size, disable_split_kv, num_colocated_ctas, uniform_q_len,
        ) -> "Array<int>";
        "0.7.4": (
            float_workspace, int_workspace, pinned_int_workspace, qo_indptr, kv_indptr, kv_len_arr,
            total_num_rows, batch_size, num_qo_heads, num_kv_heads, page_size,
            enable_cuda_graph, head_dim_qk, head_dim_vo, causal, window_left,
            fixed_split_size, disable_split_kv, num_colocated_ctas, uniform_q_len, fixed_uniform_q_len,
        ) -> "Array<int>";
    }
    pub(super) struct Fa3Plan = "plan"(
        float_workspace: Tensor, int_workspace: Tensor, pinned_int_workspace: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_len_arr: Tensor,
        total_num_rows: Int, batch_size: Int, num_qo_heads: Int, num_kv_heads: Int, page_size: Int,
        enable_cuda_graph: Bool, head_dim_qk: Int, head_dim_vo: Int, causal: Bool, window_left: Int,
    ) -> "Array<int>";
    pub(super) struct Fa2PagedRun = "paged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, qo_indptr: Tensor, paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_custom_mask: OptTensorObject, maybe_mask_indptr: OptTensorObject,
        maybe_alibi_slopes: OptTensorObject, maybe_prefix_len_ptr: OptTensorObject,
        maybe_token_pos_in_items_ptr: OptTensorObject, maybe_max_item_len_ptr: OptTensorObject,
        maybe_k_cache_sf: OptTensorObject, maybe_v_cache_sf: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
        token_pos_in_items_len: Int,
    ) -> "void";
    pub(super) struct Fa2RaggedRun = "ragged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_custom_mask: OptTensorObject, maybe_mask_indptr: OptTensorObject,
        maybe_alibi_slopes: OptTensorObject, maybe_prefix_len_ptr: OptTensorObject,
        maybe_token_pos_in_items_ptr: OptTensorObject, maybe_max_item_len_ptr: OptTensorObject,
        maybe_k_cache_sf: OptTensorObject, maybe_v_cache_sf: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
        token_pos_in_items_len: Int,
    ) -> "void";
    pub(super) struct Fa3PagedRun = "paged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, qo_indptr: Tensor, paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_prefix_len_ptr: OptTensorObject, maybe_token_pos_in_items_ptr: OptTensorObject,
        maybe_max_item_len_ptr: OptTensorObject, maybe_scale_v: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, scale_v_scalar: Float, token_pos_in_items_len: Int,
    ) -> "void";
    pub(super) struct Fa3RaggedRun = "ragged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        maybe_prefix_len_ptr: OptTensorObject, maybe_token_pos_in_items_ptr: OptTensorObject,
        maybe_max_item_len_ptr: OptTensorObject, maybe_scale_v: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, scale_v_scalar: Float, token_pos_in_items_len: Int,
    ) -> "void";
    pub(super) struct SinkPagedRun = "paged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor,
        paged_k_cache: Tensor, paged_v_cache: Tensor, qo_indptr: Tensor, paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        sink: TensorObject, sm_scale: Float,
    ) -> "void";
    pub(super) struct SinkRaggedRun = "ragged_run"(
        float_workspace: Tensor, int_workspace: Tensor, plan_info: IntArray, q: Tensor, k: Tensor, v: Tensor,
        qo_indptr: Tensor, kv_indptr: Tensor, o: Tensor, maybe_lse: OptTensor,
        mask_mode: Int, layout: Int, window_left: Int, enable_pdl: Bool,
        sink: TensorObject, sm_scale: Float,
    ) -> "void";
}

/// Modules with 16-bit queries; those with 8-bit ones take other arguments. The
/// second name of FlashAttention 2's is that of FlashInfer 0.7.4.
const FA2_MODULES: &str = "batch_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False";
const FA2_MODULES_0_7: &str =
    "batch_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False_kv_stride_equal";
const FA3_MODULES: &str = "batch_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False_sm90";
const FA2_SINK_MODULES: &str = "batch_prefill_with_attention_sink_kv_cache_*_";
const FA3_SINK_MODULES: &str = "batch_prefill_with_attention_sink_kv_cache_*_sm90";

pub(super) const SIGNATURES: &[(&str, &[Signature])] = &[
    (FA2_MODULES, Fa2Plan::SIGNATURES),
    (FA2_MODULES, Fa2PagedRun::SIGNATURES),
    (FA2_MODULES, Fa2RaggedRun::SIGNATURES),
    (FA2_MODULES_0_7, Fa2Plan::SIGNATURES),
    (FA2_MODULES_0_7, Fa2PagedRun::SIGNATURES),
    (FA2_MODULES_0_7, Fa2RaggedRun::SIGNATURES),
    (FA3_MODULES, Fa3Plan::SIGNATURES),
    (FA3_MODULES, Fa3PagedRun::SIGNATURES),
    (FA3_MODULES, Fa3RaggedRun::SIGNATURES),
    (FA2_SINK_MODULES, Fa2Plan::SIGNATURES),
    (FA2_SINK_MODULES, SinkPagedRun::SIGNATURES),
    (FA2_SINK_MODULES, SinkRaggedRun::SIGNATURES),
    (FA3_SINK_MODULES, Fa3Plan::SIGNATURES),
    (FA3_SINK_MODULES, SinkPagedRun::SIGNATURES),
    (FA3_SINK_MODULES, SinkRaggedRun::SIGNATURES),
];
