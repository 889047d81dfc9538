//! Two GPUs say what one says.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;
use crate::{
    backend::parallel::{Leader, follow},
    group::{
        Group,
        tests::{with_ranks, with_two_processes},
    },
    tests::tiny::Sizes,
};

/// The [turn] of two GPUs; `None`, said on stderr, if there is one.
pub fn turn_of_two() -> Option<MutexGuard<'static, ()>> {
    let turn = turn()?;
    let has_two = crate::backend::gpu::is_there(1);
    if !has_two {
        say("skipped: this machine has one GPU, and two are wanted");
    }
    has_two.then_some(turn)
}

/// Has two GPUs compute the pinned model, and gives rank 0's to `work`.
fn with_two_gpus(
    options: GpuOptions,
    pool: fn() -> PageAllocator,
    work: fn(&mut dyn Backend, &PageAllocator),
) {
    let store = Store::open(hub::store_config().unwrap()).unwrap();
    let path = store.locate(&hub::smollm2(), Fetch::Allowed).expect("the pinned model").path;
    with_ranks(2, |group| with_its_gpu(group, &path, options, &pool(), work));
}

/// Has a rank's GPU compute its part of a file, and gives rank 0's to `work`.
fn with_its_gpu(
    group: Arc<Group>,
    path: &Path,
    options: GpuOptions,
    pool: &PageAllocator,
    work: impl FnOnce(&mut dyn Backend, &PageAllocator),
) {
    let rank = group.rank();
    let model = Model::open(path).unwrap().divide(rank).unwrap();
    let options = GpuOptions { ordinal: rank.rank, ..options };
    let layers = model.layers();
    let mut gpu =
        Gpu::of_rank(&model.even_config(), model.ends().unwrap(), layers, pool, options, Some(&group))
            .unwrap();
    match rank.rank {
        0 => work(&mut Leader::new(gpu, group).unwrap(), pool),
        _ => follow(&mut gpu, pool, &group).unwrap(),
    }
}

#[test]
fn two_gpus_give_the_known_ids() {
    let Some(_turn) = turn_of_two() else { return };
    with_two_gpus(GpuOptions::new(64), || PageAllocator::new(8, 16).unwrap(), check_known_ids);
}

/// Ids are not compared here: each rank rounds its part of a sum, and tokens may be nearly as likely.
#[test]
fn logits_on_two_gpus_are_those_of_the_cpu() {
    let Some(_turn) = turn_of_two() else { return };
    with_two_gpus(GpuOptions::new(MIXED_STEP), mixed_pool, |gpu, pool| {
        check_mixed_logits(&mut WithLogits(gpu), pool);
    });
}

/// Requests of [`many_logits`], so many that cuBLASLt computes their products.
const MANY: usize = 40;
/// Tokens of each: a prompt, and what follows one by one.
const PROMPT: usize = 3;
const FOLLOWING: usize = 6;

/// A model whose rows are as wide as FlashInfer's kernel norms them, on processes, between which it adds up, and with
/// so many requests that their rows are normed with it, early in a graph.
#[test]
fn logits_of_two_processes_are_those_of_the_cpu() {
    let Some(_turn) = turn_of_two() else { return };
    let test = "tests::gpu::ranks::logits_of_two_processes_are_those_of_the_cpu";
    with_two_processes(test, &[&[], &[("FLASHINFER_SUMS", "nccl")]], |group| {
        let folder = tempfile::tempdir().unwrap();
        let path = wide().write(&folder);
        let pages = MANY * (PROMPT + FOLLOWING).div_ceil(4);
        // One is for what a step is filled up with.
        let pool = || PageAllocator::new(pages + 1, 4).unwrap();
        with_its_gpu(group, &path, GpuOptions::new(MANY * PROMPT), &pool(), |gpu, gpu_pool| {
            let (model, cpu_pool) = (Model::open(&path).unwrap(), pool());
            let mut cpu = Cpu::new(&model.config, model.ends().unwrap(), model.layers(), &cpu_pool).unwrap();
            let want = many_logits(&mut cpu, &cpu_pool);
            // The second round replays the graphs of the first.
            for round in 0..2 {
                let got = many_logits(&mut WithLogits(gpu), gpu_pool);
                let name = format!("round {round}");
                check_rows(&name, &got, &want, model.config.vocab_size, LOGITS_BOUND);
            }
        });
    });
}

/// A model of three layers and four heads of 64, of random weights.
fn wide() -> Tiny {
    let mut tiny = Tiny::sized(Sizes { layers: 3, vocab: 512, hidden: 256, inner: 512, kv_heads: 2 });
    tiny.value = |name, shape, at| {
        let mut hasher = DefaultHasher::new();
        (name, at).hash(&mut hasher);
        let unit = hasher.finish() as f32 / u64::MAX as f32 * 2.0 - 1.0;
        match *shape {
            [_, columns] => unit * (3.0 / columns as f32).sqrt(),
            _ => 1.0 + unit / 4.0,
        }
    };
    tiny
}

/// The logits after each request's tokens: a prompt of its own, then single ones.
fn many_logits(engine: &mut dyn Backend, pool: &PageAllocator) -> Vec<f32> {
    let mut batch = Batch::new(pool);
    (0..MANY).for_each(|_| batch.push(Sequence::new(pool)).unwrap());
    let vocab = engine.vocab_size();
    let mut all = Vec::new();
    for step in 0..=FOLLOWING {
        let len = if step == 0 { PROMPT } else { 1 };
        batch.append([len; MANY]).unwrap();
        let tokens: Vec<_> =
            (0..MANY * len).map(|at| ((31 * at * at + 17 * step + at) % vocab) as u32).collect();
        let outputs: Vec<_> = (1..=MANY).map(|request| Output::greedy(request * len - 1)).collect();
        let tokens = StepToken::known(&tokens);
        engine.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs }).unwrap();
        all.extend(engine.logits().unwrap());
    }
    all
}

/// Asks for log-probabilities, as ranks tell each other no logits that nobody looks at.
struct WithLogits<'a>(&'a mut dyn Backend);

impl Backend for WithLogits<'_> {
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        let outputs = step.outputs.iter().cloned().map(|output| Output { logprobs: Some(0), ..output });
        self.0.enqueue(&Step { outputs: &outputs.collect::<Vec<_>>(), ..*step })
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        self.0.collect()
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.0.logits()
    }
}

#[test]
fn two_gpus_capture_graphs_early() {
    let Some(_turn) = turn_of_two() else { return };
    with_two_gpus(
        GpuOptions::new(64),
        || PageAllocator::new(32, 16).unwrap(),
        |gpu, pool| {
            assert_eq!(capture_graphs(gpu, pool, 8192, 6, Duration::from_secs(600)).unwrap(), 6);
            check_known_ids(gpu, pool);
        },
    );
}
