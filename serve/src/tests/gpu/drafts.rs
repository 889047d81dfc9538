//! Steps that check drafts on the GPU: graphs, in which each row is a request of its own.

use super::*;

/// New tokens of three requests: prompts, drafts with and without others beside them, single tokens.
const STEPS: [[usize; 3]; 7] = [[20, 4, 9], [3, 1, 2], [5, 5, 5], [0, 4, 1], [1, 1, 1], [2, 3, 3], [0, 1, 0]];

/// A step of known tokens, with an output for each row.
fn check_all(gpu: &mut Gpu, batch: &Batch, tokens: &[u32]) -> Vec<f32> {
    let outputs: Vec<_> = (0..tokens.len()).map(Output::greedy).collect();
    gpu.step(&Step { batch, tokens: &StepToken::known(tokens), outputs: &outputs }).unwrap();
    gpu.logits().unwrap()
}

/// The logits of requests that read the same tokens, in steps that are graphs where they can be.
fn drafted(gpu: &mut Gpu, pool: &PageAllocator, tokens: &[u32], graphs: bool) -> Vec<f32> {
    gpu.set_graphs(graphs);
    let mut batch = Batch::new(pool);
    (0..3).for_each(|_| batch.push(Sequence::new(pool)).unwrap());
    let (mut all, mut at) = (Vec::new(), [0; 3]);
    for (index, lens) in STEPS.into_iter().enumerate() {
        batch.append(lens).unwrap();
        let rows =
            at.iter().zip(lens).flat_map(|(&at, len)| (at..at + len).map(|at| tokens[at % tokens.len()]));
        let rows: Vec<_> = rows.collect();
        at.iter_mut().zip(lens).for_each(|(at, len)| *at += len);
        if index == 0 {
            let (tokens, outputs) = (StepToken::known(&rows), [Output::greedy(19)]);
            gpu.step(&Step { batch: &batch, tokens: &tokens, outputs: &outputs }).unwrap();
            all.extend(gpu.logits().unwrap());
        } else {
            all.extend(check_all(gpu, &batch, &rows));
        }
        assert_eq!(gpu.replay().is_ok(), graphs && index > 0, "{lens:?}");
    }
    all
}

/// Graphs of drafts, of which the second round replays those of the first, against prefill.
fn check(name: &str, gpu: &mut Gpu, pool: &PageAllocator, tokens: &[u32]) {
    let vocab = gpu.vocab_size();
    let want = drafted(gpu, pool, tokens, false);
    for round in 0..2 {
        let got = drafted(gpu, pool, tokens, true);
        check_rows(&format!("{name}, round {round}"), &got, &want, vocab, LOGITS_BOUND);
    }
}

#[test]
fn steps_that_check_drafts_are_graphs() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    for (name, sizes) in [("biases", forward::BIASES), ("experts", forward::EXPERTS)] {
        let tiny = sizes.file();
        let model = Model::open(&tiny.write(&folder)).unwrap();
        let pool = PageAllocator::new(40, 4).unwrap();
        let (ends, layers) = (model.ends().unwrap(), model.layers());
        let mut gpu = Gpu::new(&model.config, ends, layers, &pool, GpuOptions::new(64)).unwrap();
        let longest = STEPS.iter().map(|lens| lens[0]).sum();
        check(name, &mut gpu, &pool, &forward::clear_tokens(&tiny, sizes, longest).0);
    }
    let loaded = loaded().expect("the pinned model");
    let pool = PageAllocator::new(40, 4).unwrap();
    check("smollm2", &mut loaded.gpu(&pool, 64), &pool, CHAT.0);
}

/// Where there is no page to fill up with, and where rows are many.
#[test]
fn other_steps_of_drafts_are_prefill() {
    let Some(_turn) = turn() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::BIASES.file().write(&folder)).unwrap();
    let gpu = |pool: &PageAllocator| {
        let (ends, layers) = (model.ends().unwrap(), model.layers());
        Gpu::new(&model.config, ends, layers, pool, GpuOptions::new(128)).unwrap()
    };
    let tokens: Vec<_> = (0..70).map(|at| at * 13 % model.config.vocab_size as u32).collect();
    let vocab = model.config.vocab_size;

    let pool = PageAllocator::new(2, 4).unwrap();
    let (mut scarce, mut batch) = (gpu(&pool), Batch::new(&pool));
    batch.push(Sequence::new(&pool)).unwrap();
    batch.append([5]).unwrap();
    check_all(&mut scarce, &batch, &tokens[..5]);
    batch.append([3]).unwrap();
    assert_eq!(pool.free_pages(), 0);
    let prefill = check_all(&mut scarce, &batch, &tokens[5..8]);
    assert!(scarce.replay().is_err());
    batch.truncate(0, 5).unwrap();
    batch.append([2]).unwrap();
    let graph = check_all(&mut scarce, &batch, &tokens[5..7]);
    assert!(scarce.replay().is_ok());
    check_rows("no page", &graph, &prefill[..2 * vocab], vocab, LOGITS_BOUND);

    let pool = PageAllocator::new(20, 4).unwrap();
    let (mut many, mut batch) = (gpu(&pool), Batch::new(&pool));
    (0..2).for_each(|_| batch.push(Sequence::new(&pool)).unwrap());
    for (lens, graph) in [([32, 32], true), ([33, 32], false)] {
        (0..2).for_each(|request| batch.truncate(request, 0).unwrap());
        batch.append(lens).unwrap();
        check_all(&mut many, &batch, &tokens[..lens.iter().sum()]);
        assert_eq!(many.replay().is_ok(), graph, "{lens:?}");
    }
}
