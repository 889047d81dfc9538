//! Weights and the KV cache in 8 bits: what that does to logits and answers.

use cudarc::driver::sys;
use flashinfer_rs::{DType, FlashInferError};

use super::{architectures::widened, *};
use crate::backend::{gpu::HeadWidths, precision::Precision};

const WEIGHTS: GpuOptions = GpuOptions { weights: Precision::E4m3, ..SIXTEEN };
const KV: GpuOptions = GpuOptions { kv: Precision::E4m3, ..SIXTEEN };
const BOTH: GpuOptions = GpuOptions { weights: Precision::E4m3, ..KV };
const SIXTEEN: GpuOptions = GpuOptions {
    ordinal: 0,
    max_tokens: 512,
    deterministic: false,
    weights: Precision::Auto,
    kv: Precision::Auto,
};

/// Rows of logits of small models may be off by so much of their norm, in the mean of all: each
/// product by about 4 % of its own, and the cache's numbers by 3 % each. Single rows may be off by
/// more, where a router chooses another expert.
const WEIGHTS_BOUND: f32 = 0.15;
const KV_BOUND: f32 = 0.1;

/// How far a row is off, of its norm.
fn error(got: &[f32], want: &[f32]) -> f32 {
    norm(got.iter().zip(want).map(|(a, b)| a - b)) / norm(want.iter().copied())
}

/// A small model on the GPU, in steps of prompts and graphs, against the CPU with all bits.
fn check_small(name: &str, sizes: forward::Sizes, dtype: DType, options: GpuOptions, bound: f32) {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&sizes.file().write(&folder)).unwrap();
    let vocab = model.config.vocab_size;
    let config = crate::model::Config { dtype, ..model.config.clone() };
    let tokens: Vec<_> = (0..FORCED as u32).map(|at| at * 31 % vocab as u32).collect();
    let pool = || PageAllocator::new(FORCED_PAGES, 4).unwrap();
    let (cpu_pool, gpu_pool) = (pool(), pool());
    let mut cpu = Cpu::new(&model.config, model.ends().unwrap(), model.layers(), &cpu_pool).unwrap();
    let options = GpuOptions { max_tokens: FORCED_STEP, ..options };
    let mut gpu = Gpu::new(&config, model.ends().unwrap(), model.layers(), &gpu_pool, options).unwrap();
    let (want, _) = force(&mut cpu, &cpu_pool, &tokens);
    // The second round replays the graphs of the first.
    for round in 0..2 {
        let (got, _) = force(&mut gpu, &gpu_pool, &tokens);
        let rows = got.chunks_exact(vocab).zip(want.chunks_exact(vocab));
        let errors: Vec<_> = rows.map(|(got, want)| error(got, want)).collect();
        let mean = errors.iter().sum::<f32>() / errors.len() as f32;
        eprintln!("{name}, {dtype}, round {round}: rows are off by {mean:.1e} in the mean");
        assert!(mean <= bound, "{name}, {dtype}, round {round}: {errors:?}");
    }
}

/// Experts with heads of a width for which the tests have kernels of an `e4m3` cache.
const WIDE_EXPERTS: forward::Sizes = forward::Sizes { head_dim: 128, ..forward::EXPERTS };

#[test]
fn small_models_with_8_bit_weights_are_near() {
    let Some(_turn) = turn() else { return };
    for dtype in [DType::F16, DType::BF16] {
        check_small("biases", forward::BIASES, dtype, WEIGHTS, WEIGHTS_BOUND);
        check_small("experts", forward::EXPERTS, dtype, WEIGHTS, WEIGHTS_BOUND);
        let deterministic = GpuOptions { deterministic: true, ..WEIGHTS };
        check_small("deterministic", forward::BIASES, dtype, deterministic, WEIGHTS_BOUND);
    }
}

#[test]
fn small_models_with_an_8_bit_cache_are_near() {
    let Some(_turn) = turn() else { return };
    for dtype in [DType::F16, DType::BF16] {
        check_small("biases", forward::BIASES, dtype, KV, KV_BOUND);
        check_small("experts", WIDE_EXPERTS, dtype, KV, KV_BOUND);
        let deterministic = GpuOptions { deterministic: true, ..KV };
        check_small("deterministic", forward::BIASES, dtype, deterministic, KV_BOUND);
        check_small("both", forward::BIASES, dtype, BOTH, WEIGHTS_BOUND);
    }
}

/// Heads of SmolLM2 are half as wide as the tests' kernels of an `e4m3` cache.
fn smollm2(options: GpuOptions, pool: &PageAllocator) -> Gpu {
    let loaded = loaded().expect("the pinned model");
    if options.kv == Precision::Auto {
        return loaded.gpu_with(pool, options);
    }
    let mut config = loaded.model.config.clone();
    let widths = HeadWidths { model: config.head_dim, padded: 128 };
    config.head_dim = widths.padded;
    let layers = loaded.layers.iter().cloned().map(|layer| widened(layer, widths));
    Gpu::new(&config, loaded.ends.clone(), layers, pool, options).unwrap()
}

const QUESTIONS: [&str; 8] = [
    "What is the capital of France?",
    "Name the planets of the solar system.",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is the difference between a virus and a bacterium?",
    "Give me three tips for sleeping well.",
    "Explain what a list is in Python, with an example.",
];
/// Tokens of each answer.
const ANSWER: usize = 64;

/// A question and an answer, and how many tokens are the question's.
struct Said {
    tokens: Vec<u32>,
    question: usize,
}

/// The logits that made an answer: a row for each of its tokens.
fn logits(gpu: &mut Gpu, pool: &PageAllocator, said: &Said) -> Vec<f32> {
    let mut batch = Batch::new(pool);
    batch.push(Sequence::new(pool)).unwrap();
    let tokens = &said.tokens[..said.tokens.len() - 1];
    batch.append([tokens.len()]).unwrap();
    let outputs: Vec<_> = (said.question - 1..tokens.len()).map(Output::greedy).collect();
    gpu.step(&Step { batch: &batch, tokens: &StepToken::known(tokens), outputs: &outputs }).unwrap();
    gpu.logits().unwrap()
}

/// The natural logarithms of the softmax of a row.
fn logprobs(row: &[f32]) -> Vec<f64> {
    let most = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - most).exp()).sum();
    row.iter().map(|&x| f64::from(x) - most - sum.ln()).collect()
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap_or(0)
}

/// What 8 bits do to SmolLM2: for the answers that it gives with 16, the error of logits, the
/// divergence of what comes next, and how often the likeliest token is the same; and the answers
/// that it gives itself.
#[test]
fn what_8_bits_do_to_smollm2() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let vocab = loaded.model.config.vocab_size;
    let pool = || PageAllocator::new(64, 16).unwrap();
    let answer = |gpu: &mut Gpu, pool: &PageAllocator, question: &[u32]| {
        solo(gpu, pool, question, ANSWER, limits(512, 0)).0
    };
    let questions: Vec<_> = QUESTIONS.iter().map(|question| ask(&loaded.text, None, question)).collect();
    let of_16 = pool();
    let mut gpu = smollm2(SIXTEEN, &of_16);
    let said: Vec<_> = questions
        .iter()
        .map(|question| Said {
            tokens: [question.as_slice(), &answer(&mut gpu, &of_16, question)].concat(),
            question: question.len(),
        })
        .collect();
    let want: Vec<_> = said.iter().map(|said| logits(&mut gpu, &of_16, said)).collect();
    drop(gpu);
    eprintln!(
        "| 8 bits | mean error of logits | mean divergence, nats | largest | same likeliest token | tokens until an answer differs |"
    );
    eprintln!("|---|---|---|---|---|---|");
    for (name, options, divergence, same) in
        [("weights", WEIGHTS, 0.06, 0.88), ("KV cache", KV, 0.02, 0.92), ("both", BOTH, 0.08, 0.86)]
    {
        let pool = pool();
        let mut gpu = smollm2(options, &pool);
        let (mut errors, mut divergences, mut equal, mut common) = (Vec::new(), Vec::new(), 0, 0);
        for (said, want) in said.iter().zip(&want) {
            let got = logits(&mut gpu, &pool, said);
            for (got, want) in got.chunks_exact(vocab).zip(want.chunks_exact(vocab)) {
                errors.push(f64::from(error(got, want)));
                let (p, q) = (logprobs(want), logprobs(got));
                divergences.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
                equal += usize::from(best(got) == best(want));
            }
            let own = answer(&mut gpu, &pool, &said.tokens[..said.question]);
            common += own.iter().zip(&said.tokens[said.question..]).take_while(|(a, b)| a == b).count();
        }
        let rows = errors.len() as f64;
        let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / rows;
        let largest = divergences.iter().copied().fold(0.0, f64::max);
        eprintln!(
            "| {name} | {:.3} | {:.4} | {largest:.3} | {:.1} % | {:.1} of {ANSWER} |",
            mean(&errors),
            mean(&divergences),
            equal as f64 / rows * 1e2,
            common as f64 / said.len() as f64,
        );
        assert!(mean(&divergences) <= divergence, "{name}");
        assert!(equal as f64 >= same * rows, "{name}: {equal} of {rows}");
        let paris = answer(&mut gpu, &pool, &questions[0]);
        let mut stream = loaded.text.stream();
        let text: String = paris.iter().map(|&token| stream.push(token)).collect();
        assert!(text.contains("Paris"), "{name}: {text}");
    }
}

/// The most bytes that the GPU's memory pool has held at once since its mark was set to zero.
fn high_water_mark(gpu: &Gpu) -> u64 {
    let mut bytes = 0u64;
    with_pool(gpu, |pool, mark| {
        // SAFETY: the pool is the device's, and the attribute is a `u64`.
        unsafe { sys::cuMemPoolGetAttribute(pool, mark, (&raw mut bytes).cast()) }
    });
    bytes
}

fn with_pool(gpu: &Gpu, call: impl FnOnce(sys::CUmemoryPool, sys::CUmemPool_attribute) -> sys::CUresult) {
    gpu.cuda().context().synchronize().unwrap();
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device is there, and the pool's address is written.
    let found = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, gpu.cuda().context().cu_device()) };
    found.result().unwrap();
    call(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH).result().unwrap();
}

/// 8 bits need no 16 on the way: half the bytes are read in a step, and loading needs no more
/// memory than they do.
#[test]
fn weights_of_8_bits_need_half_the_memory() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let load = |options, before: &Gpu| {
        with_pool(before, |pool, mark| {
            let mut zero = 0u64;
            // SAFETY: as above.
            unsafe { sys::cuMemPoolSetAttribute(pool, mark, (&raw mut zero).cast()) }
        });
        let pool = PageAllocator::new(8, 16).unwrap();
        let gpu = loaded.gpu_with(&pool, options);
        (gpu.weight_bytes(), high_water_mark(&gpu))
    };
    // An engine that is there all the time: modules and kernels are loaded.
    let folder = tempfile::tempdir().unwrap();
    let tiny = Model::open(&forward::EXPERTS.file().write(&folder)).unwrap();
    let pool = PageAllocator::new(8, 16).unwrap();
    let before = Gpu::new(&tiny.config, tiny.ends().unwrap(), tiny.layers(), &pool, WEIGHTS).unwrap();
    // Choosing products takes memory of its own, once.
    for options in [SIXTEEN, WEIGHTS] {
        load(options, &before);
    }
    let ((half, half_mark), (quantized, quantized_mark)) = (load(SIXTEEN, &before), load(WEIGHTS, &before));
    let embedding = 2 * loaded.model.config.vocab_size * loaded.model.config.hidden_size;
    let layers = half - embedding;
    assert!(quantized - embedding <= layers * 51 / 100, "{quantized} of {half}");
    let saved = half_mark.saturating_sub(quantized_mark) as usize;
    assert!(saved >= layers * 45 / 100, "{saved} bytes are saved of {layers}");
}

/// The same bits alone and beside others, with both.
#[test]
fn answers_in_8_bits_do_not_depend_on_company() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let pool = PageAllocator::new(400, 4).unwrap();
    let (ends, layers) = (model.ends().unwrap(), model.layers());
    let options = GpuOptions { max_tokens: 128, deterministic: true, ..BOTH };
    let mut gpu = Gpu::new(&model.config, ends, layers, &pool, options).unwrap();
    let tokens: Vec<_> = (0..17).map(|at| at * 13 % model.config.vocab_size as u32).collect();
    deterministic::check_rows_are_equal("8 bits", &mut gpu, &pool, &tokens);
}

/// Drafts, prefixes, forks and pages that are too few go on as they do with 16 bits.
#[test]
fn an_8_bit_cache_is_shared_and_preempted() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let pool = PageAllocator::new(14, 4).unwrap();
    let (ends, layers) = (model.ends().unwrap(), model.layers());
    let options = GpuOptions { max_tokens: 64, deterministic: true, ..KV };
    let mut gpu = Gpu::new(&model.config, ends, layers, &pool, options).unwrap();
    let limits = |draft| Limits { context: 64, ends: [].into(), ..limits(24, draft) };
    let prompt: Vec<u32> = (0..13).map(|at| at * 13 % 300).collect();
    let prompts = [&prompt[..], &prompt[..9], &prompt[..5], &prompt[..12]];
    let alone: Vec<_> = prompts.iter().map(|prompt| solo(&mut gpu, &pool, prompt, 20, limits(0)).0).collect();
    let mut requests = Requests::new(&pool, gpu.vocab_size(), limits(3));
    for prompt in prompts {
        requests.submit(prompt, &greedy(20)).unwrap();
    }
    requests.finish(&mut gpu);
    let stats = requests.scheduler.stats();
    assert!(stats.preemptions > 0 && stats.saved > 0, "{stats:?}");
    for (request, alone) in alone.iter().enumerate() {
        assert_eq!(&requests.answer(request).ids(), alone, "request {request}");
    }
    drop(requests);
    assert_eq!(pool.used_pages(), 0);
}

/// Whatever an 8-bit cache cannot be is told before weights are read.
#[test]
fn models_that_an_8_bit_cache_cannot_serve_are_refused() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model =
        Model::open(&forward::Sizes { head_dim: 96, ..forward::BIASES }.file().write(&folder)).unwrap();
    let pool = PageAllocator::new(8, 4).unwrap();
    let layers = model.layers().inspect(|_| panic!("a layer was read"));
    let error = Gpu::new(&model.config, model.ends().unwrap(), layers, &pool, KV).err().unwrap();
    assert!(error.to_string().contains("96 of the 128 elements of a head are turned"), "{error}");
    assert!(error.downcast_ref::<FlashInferError>().is_none());
}

/// A CPU keeps what the file has.
#[test]
fn the_cpu_has_no_8_bits() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&Tiny::new().write(&folder)).unwrap();
    let pool = PageAllocator::new(4, 4).unwrap();
    let capacity = limits(16, 0).step_capacity();
    for options in [WEIGHTS, KV] {
        let error = load(Place::Cpu, &model, &pool, capacity, options, None, None).err().unwrap().to_string();
        assert_eq!(error, "weights or a KV cache of e4m3 need a GPU; expected `auto` on the CPU");
        // SAFETY: opening a library of NVIDIA's runs nothing but its initializers.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            let error =
                load(Place::Auto, &model, &pool, capacity, options, None, None).err().unwrap().to_string();
            assert_eq!(error, "no GPU can be used: there is no NVIDIA driver");
        }
    }
}
