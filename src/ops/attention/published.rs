//! Which of the modules that a spec can name are in FlashInfer's wheels.
//!
//! They are built for some head dimensions only. So a module that no local
//! source holds need not be looked for in a download of 1.7 GB, if it cannot be
//! there. A wheel that a user built may hold others.
//!
//! Source: `flashinfer/aot.py`; all versions from 0.6.13 to 0.7.4 have these, but
//! for attention of one request, which is gone since 0.6.18.

use std::cmp::Reverse;

use super::{
    modules::{Family, SINGLE, shown},
    spec::{AttentionSpec, Backend, PosEncodingMode},
};
use crate::{artifacts::FlashInferVersion, dtype::DType, error::FlashInferError};

/// Widths of queries and keys, and of values.
type HeadDims = (usize, usize);

const EQUAL: &[HeadDims] = &[(64, 64), (128, 128), (256, 256)];
const FA3: &[HeadDims] = &[(64, 64), (128, 128), (192, 128), (256, 256)];
const FA3_8_BIT: &[HeadDims] = &[(128, 128), (256, 256)];
const SINKS: &[HeadDims] = &[(64, 64)];

/// The head dimensions that there are for a spec's element types and options.
fn head_dims(spec: &AttentionSpec, family: Family, backend: Backend) -> &'static [HeadDims] {
    let eight_bit = spec.dtype_q.size() == 1;
    let types = [spec.dtype_q, spec.dtype_kv].iter().all(|&dtype| dtype != DType::E5M2)
        && (eight_bit || spec.dtype_o == spec.dtype_q);
    match (family, backend) {
        _ if !types || spec.pos_encoding_mode != PosEncodingMode::None => &[],
        _ if spec.attention_sink => {
            if spec.dtype_kv == spec.dtype_q && !eight_bit {
                SINKS
            } else {
                &[]
            }
        }
        (Family::Single, Backend::Fa3) => &[],
        (Family::Batch, Backend::Fa3) => {
            if eight_bit {
                FA3_8_BIT
            } else {
                FA3
            }
        }
        _ => EQUAL,
    }
}

/// Whether FlashInfer's wheels of a version have the module.
pub(super) fn is_published(
    spec: &AttentionSpec,
    version: FlashInferVersion,
    family: Family,
    backend: Backend,
) -> bool {
    (family != Family::Single || version < SINGLE.since)
        && head_dims(spec, family, backend).contains(&(spec.head_dim_qk, spec.head_dim_vo))
}

/// Says that none of these backends has a published module, and what there is
/// instead; `name` is that of the first.
pub(super) fn unpublished(
    spec: &AttentionSpec,
    family: Family,
    backends: impl IntoIterator<Item = Backend>,
    name: &str,
) -> FlashInferError {
    let own = (spec.head_dim_qk, spec.head_dim_vo);
    let mut others: Vec<HeadDims> = backends
        .into_iter()
        .flat_map(|backend| head_dims(spec, family, backend))
        .copied()
        // Who has one width has no use for two.
        .filter(|(qk, vo)| own.0 != own.1 || qk == vo)
        .collect();
    others.sort_unstable();
    others.dedup();
    let away = |(qk, vo): HeadDims| qk.abs_diff(own.0) + vo.abs_diff(own.1);
    let nearest = others.iter().copied().min_by_key(|&dims| (away(dims), Reverse(dims)));
    let there_is = match nearest {
        Some(nearest) => {
            let others: Vec<_> = others.into_iter().map(shown).collect();
            format!("there are head dimensions {}, of which {} is nearest", listed(&others), shown(nearest))
        }
        None => "there are none with these types and options".into(),
    };
    FlashInferError::Unsupported {
        what: format!("FlashInfer's wheels have no {family} of {}", described(spec)),
        available: format!(
            "{there_is}; for a wheel of yours that holds {name}, name it in RuntimeConfig::wheels or \
             FLASHINFER_RS_WHEELS"
        ),
    }
}

/// As in "64, 128 and 256".
fn listed(names: &[String]) -> String {
    match names {
        [others @ .., last] if !others.is_empty() => format!("{} and {last}", others.join(", ")),
        names => names.concat(),
    }
}

/// What selects a module, in words.
fn described(spec: &AttentionSpec) -> String {
    let AttentionSpec { dtype_q, dtype_kv, dtype_o, .. } = *spec;
    let types = if dtype_q == dtype_kv && dtype_q == dtype_o {
        dtype_q.to_string()
    } else {
        format!("{dtype_q} queries, {dtype_kv} keys and {dtype_o} outputs")
    };
    let options = [
        (spec.window_left.is_some(), ", with a window"),
        (spec.logits_soft_cap.is_some(), ", with a soft cap"),
        (spec.attention_sink, ", with sinks"),
        (spec.pos_encoding_mode == PosEncodingMode::Alibi, ", with ALiBi"),
    ];
    let options: String = options.into_iter().filter(|(given, _)| *given).map(|(_, name)| name).collect();
    format!("{types} with head dimension {}{options}", shown((spec.head_dim_qk, spec.head_dim_vo)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Upstream's names, by version, and how many of them a spec gives; those
    /// of latent attention are four more.
    const LISTS: [(FlashInferVersion, &str, usize); 4] = [
        (FlashInferVersion::new(0, 6, 13), include_str!("../../../tests/data/module_names.txt"), 272),
        (
            FlashInferVersion::new(0, 6, 18).post(1),
            include_str!("../../../tests/data/module_names_0.6.18.post1_sm90a.txt"),
            176,
        ),
        (
            FlashInferVersion::new(0, 7, 2).post(1),
            include_str!("../../../tests/data/module_names_0.7.2.post1_sm90a.txt"),
            176,
        ),
        (
            FlashInferVersion::new(0, 7, 4),
            include_str!("../../../tests/data/module_names_0.7.4_sm90a.txt"),
            176,
        ),
    ];
    const MODULES: [(Family, Backend); 7] = [
        (Family::Batch, Backend::CudaCores),
        (Family::Batch, Backend::Fa2),
        (Family::Batch, Backend::Fa3),
        (Family::Single, Backend::CudaCores),
        (Family::Single, Backend::Fa2),
        (Family::Single, Backend::Fa3),
        (Family::Mixed, Backend::Fa2),
    ];

    fn specs() -> impl Iterator<Item = AttentionSpec> {
        let types = [DType::F16, DType::BF16, DType::E4M3, DType::E5M2];
        let types = types.into_iter().flat_map(move |q| types.map(|kv| (q, kv)));
        let types = types.flat_map(|(q, kv)| [DType::F16, DType::BF16].map(|o| (q, kv, o)));
        let widths = [32, 64, 96, 128, 192, 256, 512];
        let all = types.flat_map(move |types| widths.map(|qk| (types, qk)));
        let all = all.flat_map(move |(types, qk)| widths.map(|vo| (types, qk, vo)));
        all.flat_map(|((dtype_q, dtype_kv, dtype_o), head_dim_qk, head_dim_vo)| {
            (0..16).map(move |options| AttentionSpec {
                dtype_q,
                dtype_kv,
                dtype_o,
                head_dim_vo,
                window_left: (options & 1 != 0).then_some(127),
                logits_soft_cap: (options & 2 != 0).then_some(30.0),
                attention_sink: options & 4 != 0,
                pos_encoding_mode: [PosEncodingMode::None, PosEncodingMode::Alibi][options / 8],
                ..AttentionSpec::new(dtype_q, head_dim_qk)
            })
        })
    }

    #[test]
    fn published_modules_are_those_of_upstreams_build() {
        for (version, list, names) in LISTS {
            let list: BTreeSet<&str> = list.lines().skip(1).collect();
            let mut count = 0;
            for spec in specs() {
                for (family, backend) in MODULES {
                    let Ok(name) = spec.module(version, family, backend) else { continue };
                    let published = is_published(&spec, version, family, backend);
                    assert_eq!(published, list.contains(name.as_str()), "{version}: {name}");
                    count += usize::from(published);
                }
            }
            assert_eq!(count, names, "{version}");
        }
    }

    #[test]
    fn refusals_name_the_nearest_head_dimension() {
        let said = |spec: &AttentionSpec, family, backends: &[Backend]| {
            let backends = backends.iter().copied();
            unpublished(spec, family, backends, "batch_x").to_string()
        };
        let spec = AttentionSpec::new(DType::F16, 96);
        for (spec, family, backends, parts) in [
            (
                spec,
                Family::Batch,
                &[Backend::Fa3, Backend::Fa2][..],
                [
                    "no attention of batches of f16 with head dimension 96;",
                    "head dimensions 64, 128 and 256, of which 128 is nearest",
                ],
            ),
            (
                AttentionSpec::new(DType::BF16, 512),
                Family::Mixed,
                &[Backend::Fa2],
                ["no attention of mixed batches of bf16 with head dimension 512;", "of which 256 is nearest"],
            ),
            (
                AttentionSpec { head_dim_qk: 160, ..spec },
                Family::Batch,
                &[Backend::Fa3],
                [
                    "with head dimension 160/96;",
                    "head dimensions 64, 128, 192/128 and 256, of which 192/128 is nearest",
                ],
            ),
            (
                spec.with_attention_sink().with_window_left(3),
                Family::Batch,
                &[Backend::Fa2],
                [
                    "with head dimension 96, with a window, with sinks;",
                    "head dimensions 64, of which 64 is nearest; for a wheel of yours that holds batch_x",
                ],
            ),
            (
                spec.with_pos_encoding_mode(PosEncodingMode::Alibi),
                Family::Single,
                &[Backend::CudaCores],
                [
                    "no attention of one request of f16 with head dimension 96, with ALiBi;",
                    "there are none with these types and options",
                ],
            ),
        ] {
            let said = said(&spec, family, backends);
            parts.iter().for_each(|part| assert!(said.contains(part), "{said}"));
        }
    }
}
