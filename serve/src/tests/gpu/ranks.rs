//! Two GPUs say what one says.

use super::*;
use crate::{
    backend::parallel::{Leader, follow},
    group::tests::with_ranks,
};

/// Whether there are two; says so, if not.
pub fn has_two() -> bool {
    let two = crate::backend::gpu::is_there(1);
    if !two {
        say("skipped: this machine has one GPU, and two are wanted");
    }
    two
}

/// Has two GPUs compute the pinned model, and gives rank 0's to `work`.
fn with_two_gpus(
    options: GpuOptions,
    pool: fn() -> PageAllocator,
    work: fn(&mut dyn Backend, &PageAllocator),
) {
    let store = Store::open(hub::store_config().unwrap()).unwrap();
    let path = store.locate(&hub::smollm2(), Fetch::Allowed).expect("the pinned model").path;
    with_ranks(2, |group| {
        let rank = group.rank();
        let model = Model::open(&path).unwrap().divide(rank).unwrap();
        let pool = pool();
        let options = GpuOptions { ordinal: rank.rank, ..options };
        let layers = model.layers();
        let mut gpu =
            Gpu::of_rank(&model.even_config(), model.ends().unwrap(), layers, &pool, options, Some(&group))
                .unwrap();
        match rank.rank {
            0 => work(&mut Leader::new(gpu, group).unwrap(), &pool),
            _ => follow(&mut gpu, &pool, &group).unwrap(),
        }
    });
}

#[test]
fn two_gpus_give_the_known_ids() {
    let Some(_turn) = turn() else { return };
    if has_two() {
        with_two_gpus(GpuOptions::new(64), || PageAllocator::new(8, 16).unwrap(), check_known_ids);
    }
}

/// Ids are not compared here: each rank rounds its part of a sum, and tokens may be nearly as likely.
#[test]
fn logits_on_two_gpus_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    if has_two() {
        with_two_gpus(GpuOptions::new(MIXED_STEP), mixed_pool, |gpu, pool| {
            check_mixed_logits(&mut WithLogits(gpu), pool);
        });
    }
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
    let Some(_turn) = turn() else { return };
    if has_two() {
        with_two_gpus(
            GpuOptions::new(64),
            || PageAllocator::new(32, 16).unwrap(),
            |gpu, pool| {
                assert_eq!(capture_graphs(gpu, pool, 8192, 6, Duration::from_secs(600)).unwrap(), 6);
                check_known_ids(gpu, pool);
            },
        );
    }
}
