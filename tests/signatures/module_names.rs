//! The names of modules against those that FlashInfer's own build makes, and
//! the table of families in `docs/modules.md` against the same names.
//!
//! The lists in `data` were written by upstream's generators; the first line of
//! each says how. That of 0.6.13 is for all architectures, the others are for
//! 9.0, and two of them have names of attention only.

use std::collections::BTreeSet;
use test_support::required;

use crate::families::{Family, families};

use flashinfer_rs::{
    DType, ModuleName,
    artifacts::{FlashInferVersion, Store, StoreConfig},
    attention::{AttentionSpec, Backend, MlaSpec},
    signatures,
};

/// Upstream's names of one version.
#[derive(Clone, Copy)]
struct List {
    version: &'static str,
    text: &'static str,
    /// How many there are.
    names: usize,
    /// How many of attention a spec names.
    named: usize,
    /// How many of attention are left: those that [`is_refused`] tells.
    refused: usize,
}

const LISTS: [List; 4] = [
    List {
        version: "0.6.13",
        text: include_str!("../data/module_names.txt"),
        names: 955,
        named: 276,
        refused: 12,
    },
    List {
        version: "0.6.18.post1",
        text: include_str!("../data/module_names_0.6.18.post1_sm90a.txt"),
        names: 192,
        named: 180,
        refused: 12,
    },
    List {
        version: "0.7.2.post1",
        text: include_str!("../data/module_names_0.7.2.post1_sm90a.txt"),
        names: 192,
        named: 180,
        refused: 12,
    },
    List {
        version: "0.7.4",
        text: include_str!("../data/module_names_0.7.4_sm90a.txt"),
        names: 682,
        named: 180,
        refused: 12 + 24,
    },
];

impl List {
    fn version(&self) -> FlashInferVersion {
        FlashInferVersion::parse(self.version).unwrap()
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.text.lines().skip(1)
    }
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
fn names(spec: &AttentionSpec, version: FlashInferVersion) -> impl Iterator<Item = ModuleName> + use<> {
    let fa2 = [
        spec.decode_module(),
        spec.single_decode_module(version),
        spec.prefill_module(version, false),
        spec.single_prefill_module(version, false),
        spec.batch_attention_module(version),
    ];
    let fa3 = [spec.prefill_module(version, true), spec.single_prefill_module(version, true)];
    fa2.into_iter().chain(fa3).flatten()
}

fn mla_names(version: FlashInferVersion) -> impl Iterator<Item = ModuleName> {
    let modules = [DType::F16, DType::BF16].into_iter().flat_map(move |dtype| {
        [Backend::Fa2, Backend::Fa3].map(|backend| MlaSpec::new(dtype, 1.0).module(version, backend))
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
/// type. Nor, since 0.7.4, 8-bit keys and values with a scale for each token and
/// head, which other arguments carry.
fn is_refused(name: &str) -> bool {
    let mixed = ["dtype_q_f16_dtype_kv_bf16", "dtype_q_bf16_dtype_kv_f16"];
    name.starts_with("batch_attention_") && mixed.iter().any(|mixed| name.contains(mixed))
        || name.ends_with("_token_head_sf_kv_stride_equal")
}

#[test]
fn the_lists_are_sorted() {
    for list in LISTS {
        let first = list.text.lines().next().unwrap();
        let made_by = format!("# flashinfer-python {}, flashinfer/aot.py", list.version);
        assert!(first.starts_with(&made_by), "{first}");
        let names: Vec<_> = list.names().collect();
        assert!(names.is_sorted_by(|a, b| a < b), "{}", list.version);
        assert_eq!(names.len(), list.names, "{}", list.version);
    }
}

#[test]
fn specs_name_what_upstream_builds() {
    for list in LISTS {
        let version = list.version();
        let mut named = BTreeSet::new();
        for spec in specs() {
            for name in names(&spec, version) {
                if !is_left_out(&spec, name.as_str()) {
                    named.insert(name.as_str().to_owned());
                }
            }
        }
        named.extend(mla_names(version).map(|name| name.as_str().to_owned()));
        let built: BTreeSet<_> = list.names().filter(|name| is_attention(name)).map(str::to_owned).collect();
        let unbuilt: Vec<_> = named.difference(&built).collect();
        assert!(unbuilt.is_empty(), "{version}: upstream builds no {unbuilt:#?}");
        let unnamed: Vec<_> = built.difference(&named).collect();
        assert!(unnamed.iter().all(|name| is_refused(name)), "{version}: no spec names one of {unnamed:#?}");
        assert_eq!((named.len(), unnamed.len()), (list.named, list.refused), "{version}");
    }
}

/// Queries of 8 bits need FlashAttention 3, with keys of their type and head
/// dimensions 128 and 256; sinks have no cap; keys of 8 bits are no 192 wide with
/// FlashAttention 2; decode on CUDA cores and mixed batches have less.
#[test]
fn impossible_combinations_are_refused() {
    let version = FlashInferVersion::OLDEST;
    for spec in specs() {
        let (q, kv) = (spec.dtype_q, spec.dtype_kv);
        let convertible = q.size() == 2 && (kv == q || kv.size() == 1);
        let plain = convertible && !spec.attention_sink;
        let square = spec.head_dim_qk == spec.head_dim_vo;
        let no_cap = spec.logits_soft_cap.is_none();
        let fa3 =
            q == kv && if q.size() == 2 { spec.dtype_o == q } else { matches!(spec.head_dim_qk, 128 | 256) };
        let sinks_fit = !spec.attention_sink || no_cap;
        let whole = square || kv.size() == 2;
        for (what, module, possible) in [
            ("decode", spec.decode_module(), plain && square),
            ("single decode", spec.single_decode_module(version), plain && square),
            ("fa2", spec.prefill_module(version, false), convertible && sinks_fit && whole),
            ("fa3", spec.prefill_module(version, true), fa3 && sinks_fit),
            ("single fa2", spec.single_prefill_module(version, false), plain && whole),
            ("single fa3", spec.single_prefill_module(version, true), fa3 && !spec.attention_sink),
            ("mixed", spec.batch_attention_module(version), plain && square && spec.window_left.is_none()),
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
    let of_version = |version| {
        let named = specs().into_iter().flat_map(move |spec| names(&spec, version).collect::<Vec<_>>());
        named.chain(mla_names(version)).map(|name| name.as_str().to_owned()).collect::<Vec<_>>()
    };
    let named: BTreeSet<_> = FlashInferVersion::CALLED.into_iter().flat_map(of_version).collect();
    for name in &modules {
        assert!(named.contains(name) || is_refused(name), "no spec names {name}");
    }
    eprintln!("{} attention modules are at hand", modules.len());
}

#[test]
fn the_table_of_families_covers_every_module_once() {
    let families = families();
    for (at, list) in [LISTS[0], LISTS[3]].iter().enumerate() {
        for name in list.names().map(ModuleName::new) {
            let fits: Vec<_> = families.iter().filter(|family| family.holds(&name)).collect();
            assert_eq!(fits.len(), 1, "{}: {name} is in {fits:?}", list.version);
            let declared = signatures().iter().any(|(pattern, _)| name.matches(pattern));
            assert_eq!(fits[0].is_declared(), declared, "{name} is in {fits:?}");
        }
        for Family { patterns, counts, .. } in &families {
            let fits =
                |pattern: &&str| list.names().filter(|&name| ModuleName::new(name).matches(pattern)).count();
            let each: Vec<_> = patterns.iter().map(fits).collect();
            assert_eq!(each.iter().sum::<usize>(), counts[at], "{}: {patterns:?}", list.version);
        }
    }
    // No pattern is for nothing.
    for pattern in families.iter().flat_map(|family| &family.patterns) {
        let holds = |list: &List| list.names().any(|name| ModuleName::new(name).matches(pattern));
        assert!(holds(&LISTS[0]) || holds(&LISTS[3]), "{pattern} fits no module");
    }
}
