//! The names of modules against those that FlashInfer's own build makes, and
//! the table of families in `docs/modules.md` against the same names.
//!
//! `module_names.txt` was written by upstream's generators; its first line
//! says how.

mod families;

use std::collections::BTreeSet;
use test_support::required;

use families::{Family, families};

use flashinfer_rs::{
    DType, ModuleName,
    artifacts::{Store, StoreConfig},
    attention::{AttentionSpec, Backend, MlaSpec},
    signatures,
};

const LIST: &str = include_str!("data/module_names.txt");

/// The names in the list.
fn listed() -> impl Iterator<Item = &'static str> {
    LIST.lines().skip(1)
}

fn is_attention(name: &str) -> bool {
    name.starts_with("batch_") || name.starts_with("single_")
}

/// Element types, head dimensions, window, cap and sinks in every combination.
fn specs() -> Vec<AttentionSpec> {
    let mut specs = Vec::new();
    let stored = [DType::F16, DType::BF16, DType::E4M3];
    for (dtype_q, dtype_kv) in stored.into_iter().flat_map(|q| stored.map(|kv| (q, kv))) {
        for dtype_o in [DType::F16, DType::BF16] {
            for (head_dim_qk, head_dim_vo) in [(64, 64), (128, 128), (256, 256), (192, 128)] {
                for options in 0..8 {
                    let mut spec = AttentionSpec::new(dtype_q, head_dim_qk)
                        .with_kv_dtype(dtype_kv)
                        .with_head_dim_vo(head_dim_vo);
                    spec.dtype_o = dtype_o;
                    spec.window_left = (options & 1 != 0).then_some(127);
                    spec.logits_soft_cap = (options & 2 != 0).then_some(30.0);
                    spec.attention_sink = options & 4 != 0;
                    specs.push(spec);
                }
            }
        }
    }
    specs
}

/// Every module that a spec names.
fn names(spec: &AttentionSpec) -> impl Iterator<Item = ModuleName> {
    let fa2 = [
        spec.decode_module(),
        spec.single_decode_module(),
        spec.prefill_module(false),
        spec.single_prefill_module(false),
        spec.batch_attention_module(),
    ];
    let fa3 = [spec.prefill_module(true), spec.single_prefill_module(true)];
    fa2.into_iter().chain(fa3).flatten()
}

fn mla_names() -> impl Iterator<Item = ModuleName> {
    let modules = [DType::F16, DType::BF16].into_iter().flat_map(|dtype| {
        [Backend::Fa2, Backend::Fa3].map(|backend| MlaSpec::new(dtype, 1.0).module(backend))
    });
    modules.map(|module| module.expect("the dimensions of every MLA module"))
}

/// What upstream's generators could name, and so can a spec, but upstream's
/// build leaves out: outputs of another type than 16-bit queries; with
/// FlashAttention 2, values of another width than keys; sinks with other head
/// dimensions than 64, or over 8-bit keys; and FlashAttention 3 for a single
/// request.
fn is_left_out(spec: &AttentionSpec, name: &str) -> bool {
    let fa3 = name.ends_with("_sm90");
    (spec.dtype_q.size() == 2 && spec.dtype_o != spec.dtype_q)
        || (!fa3 && spec.head_dim_qk != spec.head_dim_vo)
        || (spec.attention_sink && (spec.head_dim_qk != 64 || spec.dtype_kv != spec.dtype_q))
        || (fa3 && name.starts_with("single_"))
}

/// Upstream builds these, and no spec names them: 16-bit keys of another type
/// than the queries, whose bits the kernels take for those of the queries'
/// type.
fn is_refused(name: &str) -> bool {
    let mixed = ["dtype_q_f16_dtype_kv_bf16", "dtype_q_bf16_dtype_kv_f16"];
    name.starts_with("batch_attention_") && mixed.iter().any(|mixed| name.contains(mixed))
}

#[test]
fn the_list_is_sorted() {
    let first = LIST.lines().next().unwrap();
    assert!(first.starts_with("# flashinfer-python 0.6.13, flashinfer/aot.py"), "{first}");
    let names: Vec<_> = listed().collect();
    assert!(names.is_sorted_by(|a, b| a < b) && names.len() == 955, "{}", names.len());
}

#[test]
fn specs_name_what_upstream_builds() {
    let mut named = BTreeSet::new();
    for spec in specs() {
        for name in names(&spec) {
            if !is_left_out(&spec, name.as_str()) {
                named.insert(name.as_str().to_owned());
            }
        }
    }
    named.extend(mla_names().map(|name| name.as_str().to_owned()));
    let built: BTreeSet<_> = listed().filter(|name| is_attention(name)).map(str::to_owned).collect();
    let unbuilt: Vec<_> = named.difference(&built).collect();
    assert!(unbuilt.is_empty(), "upstream builds no {unbuilt:#?}");
    let unnamed: Vec<_> = built.difference(&named).collect();
    assert!(unnamed.iter().all(|name| is_refused(name)), "no spec names one of {unnamed:#?}");
    // Three head dimensions, two pairs of types, with and without a cap.
    assert_eq!(unnamed.len(), 12);
    assert_eq!(named.len(), 276);
}

/// Queries of 8 bits need FlashAttention 3, with keys of their type and head
/// dimensions 128 and 256; sinks have no cap; decode on CUDA cores and mixed
/// batches have less.
#[test]
fn impossible_combinations_are_refused() {
    for spec in specs() {
        let (q, kv) = (spec.dtype_q, spec.dtype_kv);
        let convertible = q.size() == 2 && (kv == q || kv.size() == 1);
        let plain = convertible && !spec.attention_sink;
        let square = spec.head_dim_qk == spec.head_dim_vo;
        let no_cap = spec.logits_soft_cap.is_none();
        let fa3 =
            q == kv && if q.size() == 2 { spec.dtype_o == q } else { matches!(spec.head_dim_qk, 128 | 256) };
        let sinks_fit = !spec.attention_sink || no_cap;
        for (what, module, possible) in [
            ("decode", spec.decode_module(), plain && square),
            ("single decode", spec.single_decode_module(), plain && square),
            ("fa2", spec.prefill_module(false), convertible && sinks_fit),
            ("fa3", spec.prefill_module(true), fa3 && sinks_fit),
            ("single fa2", spec.single_prefill_module(false), plain),
            ("single fa3", spec.single_prefill_module(true), fa3 && !spec.attention_sink),
            ("mixed", spec.batch_attention_module(), plain && square && spec.window_left.is_none()),
        ] {
            assert_eq!(module.is_ok(), possible, "{what}: {spec:?}");
        }
    }
}

/// Modules at hand, which need not open here.
#[test]
fn specs_name_the_attention_modules_at_hand() {
    let store = Store::open(StoreConfig::from_env().unwrap()).unwrap();
    let modules: Vec<_> = store.modules().into_iter().filter(|name| is_attention(name)).collect();
    if modules.is_empty() {
        return required::skip(required::MODULES, "no local source holds modules of attention");
    }
    let named: BTreeSet<_> =
        specs().iter().flat_map(names).chain(mla_names()).map(|name| name.as_str().to_owned()).collect();
    for name in &modules {
        assert!(named.contains(name) || is_refused(name), "no spec names {name}");
    }
    eprintln!("{} attention modules are at hand", modules.len());
}

#[test]
fn the_table_of_families_covers_every_module_once() {
    let families = families();
    for name in listed().map(ModuleName::new) {
        let fits: Vec<_> = families.iter().filter(|family| family.holds(&name)).collect();
        assert_eq!(fits.len(), 1, "{name} is in {fits:?}");
        let declared = signatures().iter().any(|(pattern, _)| name.matches(pattern));
        assert_eq!(fits[0].is_declared(), declared, "{name} is in {fits:?}");
    }
    for Family { patterns, count, .. } in families {
        let fits = |pattern: &str| listed().filter(|&name| ModuleName::new(name).matches(pattern)).count();
        let each: Vec<_> = patterns.iter().map(|pattern| fits(pattern)).collect();
        assert!(!each.contains(&0), "{patterns:?} fit {each:?} modules");
        assert_eq!(each.iter().sum::<usize>(), count, "{patterns:?}");
    }
}
