//! Which modules are embedded: patterns of their names.

use super::Env;

/// The modules that are embedded unless `FLASHINFER_RS_EMBED_MODULES` names others: norm, page,
/// and paged batch decode for f16 and bf16 with head dimension 64 and 128, without sliding
/// window and without logits soft cap.
pub const DEFAULT_MODULES: [&str; 6] = [
    "norm",
    "page",
    "batch_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_64_head_dim_vo_64_posenc_0_use_swa_False_use_logits_cap_False",
    "batch_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False",
    "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_64_head_dim_vo_64_posenc_0_use_swa_False_use_logits_cap_False",
    "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False",
];

/// Whether `name` fits `pattern`, in which `*` stands for any run of characters.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let start = parts.next().unwrap_or_default();
    let Some(end) = parts.next_back() else { return pattern == name };
    let Some(middle) = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end)) else {
        return false;
    };
    // The first place of a part leaves the most for those behind it.
    parts.try_fold(middle, |rest, part| rest.split_once(part).map(|(_, behind)| behind)).is_some()
}

/// The patterns of a list, separated by commas or spaces.
pub fn split_patterns(list: &str) -> Vec<String> {
    let split = list.split(|c: char| c == ',' || c.is_whitespace());
    split.filter(|pattern| !pattern.is_empty()).map(str::to_owned).collect()
}

/// The first patterns of a list, and how many more there are.
pub(in super::super) fn shown(patterns: &[String]) -> String {
    match patterns {
        [a, b, rest @ ..] if rest.len() > 1 => format!("{a}, {b} or {} more patterns", rest.len()),
        all => all.join(", "),
    }
}

/// The patterns of `FLASHINFER_RS_EMBED_MODULES`, or the default ones.
pub(super) fn patterns(env: Env<'_>) -> Vec<String> {
    let given = split_patterns(&env("FLASHINFER_RS_EMBED_MODULES").unwrap_or_default());
    match given.is_empty() {
        true => DEFAULT_MODULES.map(str::to_owned).to_vec(),
        false => given,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_runs_of_characters() {
        for (pattern, name, want) in [
            ("norm", "norm", true),
            ("norm", "norms", false),
            ("*", "anything", true),
            ("batch_*_f16", "batch_decode_f16", true),
            ("batch_*_f16", "batch_decode_bf16", false),
            ("*decode*128*", "batch_decode_hd_128_x", true),
            ("a**b", "ab", true),
            ("a*b*c", "a_b_b", false),
            ("a*a", "a", false),
            ("*ab*b", "abab", true),
            ("é*", "é", true),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }

    /// Each star that is tried at each place would take longer than anyone waits.
    #[test]
    fn patterns_of_many_stars_are_matched_at_once() {
        assert!(!matches(&format!("{}b", "*a".repeat(40)), &"a".repeat(200)));
        assert!(matches(&"*a".repeat(40), &"a".repeat(200)));
    }
}
