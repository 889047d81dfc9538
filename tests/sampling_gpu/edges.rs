//! Rows without sense, no rows, and what is refused.

use crate::{
    common::{is_own_process, say},
    *,
};

/// Rows and parameters that mean nothing end all the same, and tokens lie in
/// the vocabulary.
#[test]
fn senseless_rows_and_parameters() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for vocab in [5, 1001, 32000] {
        let (row, _) = peaked(rng, vocab);
        let mut rows = Vec::new();
        let of = |change: &dyn Fn(usize, f32) -> f32| {
            row.iter().enumerate().map(|(token, &x)| change(token, x)).collect::<Vec<f32>>()
        };
        rows.extend(of(&|_, _| 0.0));
        rows.extend(of(&|_, _| f32::NAN));
        rows.extend(of(&|token, x| if token % 3 == 0 { f32::NAN } else { x }));
        rows.extend(of(&|token, x| if token % 4 == 1 { f32::INFINITY } else { x }));
        rows.extend(of(&|_, x| -x));
        rows.extend(of(&|_, x| x * 1e30));
        rows.extend(of(&|_, x| x * 1e-40));
        rows.extend(of(&|_, x| if x > 0.01 { f32::MAX } else { x }));
        let batch = rows.len() / vocab;
        let probs = Mirrored::new(&gpu, &[batch, vocab], rows);
        let options = options(Philox::new(rng.bits(), 0), None);
        let check = |filter: &Filter<'_>| {
            let tokens = draw::<i32>(&gpu, filter, &probs, batch, &options);
            assert!(tokens.iter().flatten().all(|&token| token < vocab), "{filter:?}: {tokens:?}");
            tokens
        };
        for filter in [
            Filter::None,
            Filter::TopK(2.into()),
            Filter::TopP(0.5.into()),
            Filter::MinP(0.5.into()),
            Filter::TopKTopP(2.into(), 0.5.into()),
        ] {
            let tokens = check(&filter);
            // Of zeros there is nothing to draw, of NaN neither; the finite
            // part of a row with NaN is drawn from.
            assert_eq!(tokens[1], None, "{filter:?}");
            if !matches!(filter, Filter::MinP(_)) {
                assert_eq!(tokens[0], None, "{filter:?}");
            }
            assert!(tokens[2].is_some_and(|token| token % 3 != 0), "{filter:?}: {:?}", tokens[2]);
        }
        for number in [0, -1, i32::MIN, i32::MAX] {
            let top_ks = gpu.cuda.clone_htod(&vec![number; batch]).unwrap();
            let top_ks = top_ks.tensor(&gpu.cuda, &[batch]).unwrap();
            check(&Filter::TopK(Parameter::PerRow(top_ks.view())));
            check(&Filter::TopKTopP(Parameter::PerRow(top_ks.view()), 0.5.into()));
        }
        for number in [0.0, -1.0, 2.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40] {
            let ps = gpu.cuda.clone_htod(&vec![number; batch]).unwrap();
            let ps = ps.tensor(&gpu.cuda, &[batch]).unwrap();
            check(&Filter::TopP(Parameter::PerRow(ps.view())));
            check(&Filter::MinP(Parameter::PerRow(ps.view())));
            check(&Filter::TopKTopP(2.into(), Parameter::PerRow(ps.view())));
        }
        // Logits of these numbers, too.
        let mut outputs = Outputs::<i32>::new(&gpu, batch);
        {
            let logits = probs.device_view();
            let call = outputs.with(&gpu, |samples| {
                sampling_from_logits(&gpu.stream, &mut samples.output, &logits, &options)
            });
            call.unwrap();
        }
        assert!(outputs.tokens(&gpu).iter().all(|token| (0..vocab as i64).contains(token)));
    }
}

/// A kernel of this crate is not compiled within a capture. In a process of its own, since other
/// tests call this one.
#[test]
fn first_calls_are_not_captured() {
    let Some(gpu) = Gpu::start_alone() else { return };
    if !is_own_process("sampling_gpu::edges::first_calls_are_not_captured", "a first call was refused") {
        return;
    }
    let logits = Mirrored::new(&gpu, &[1, 3], vec![0.5, 2.0, 1.0]);
    let mut tokens = gpu.cuda.clone_htod(&[-7]).unwrap();
    {
        let (logits, mut tokens) = (logits.device_view(), tokens.tensor_mut(&gpu.cuda, &[1]).unwrap());
        let (logits, mut tokens) = (logits, tokens.view_mut());
        let (_, call) = capture(&gpu, || argmax(&gpu.stream, &mut tokens, &logits));
        refused(call, "logits");
        say("a first call was refused");
        argmax(&gpu.stream, &mut tokens, &logits).unwrap();
        let (graph, call) = capture(&gpu, || argmax(&gpu.stream, &mut tokens, &logits));
        call.unwrap();
        graph.expect("a graph").launch().unwrap();
    }
    assert_eq!(gpu.cuda.clone_dtoh(&tokens).unwrap(), [1]);
}

/// Without rows nothing is written.
#[test]
fn no_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let probs = Mirrored::new(&gpu, &[4, 64], [peaked(rng, 64).0, peaked(rng, 64).0].concat().repeat(2));
    let none = table(&gpu, 4, Vec::new());
    let mut outputs = Outputs::<i32>::new(&gpu, 0);
    let probs = probs.device_view();
    for filter in [Filter::None, Filter::TopK(1.into()), Filter::TopP(0.5.into()), Filter::MinP(0.5.into())] {
        for (probs, options) in [
            (probs.narrow(0, 0, 0).unwrap(), options(Philox::default(), None)),
            (probs, options(Philox::default(), Some(&none))),
        ] {
            outputs.with(&gpu, |samples| sample(&gpu, samples, &probs, &filter, &options)).unwrap();
        }
    }
    outputs.rows = 1;
    assert_eq!(outputs.tokens(&gpu), [-7]);
}

/// What only a device can make wrong; the rest is in `wrong_input.rs`.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
    let probs = Mirrored::new(&gpu, &[4, 64], peaked(rng, 64).0.repeat(4));
    let mut outputs = Outputs::<i32>::new(&gpu, 4);
    let good = options(Philox::default(), None);
    {
        let elsewhere = probs.copied_to(&other);
        let call = outputs
            .with(&gpu, |samples| sample(&gpu, samples, &elsewhere.device_view(), &Filter::None, &good));
        refused(call, "probs");
        let probs = probs.device_view();
        let call = outputs.with(&other, |samples| sample(&gpu, samples, &probs, &Filter::None, &good));
        refused(call, "output");
        let mut run = |table: &BoundedTable| {
            let options = options(Philox::default(), Some(table));
            outputs.with(&gpu, |samples| sample(&gpu, samples, &probs, &Filter::None, &options))
        };
        refused(run(&table(&gpu, 5, vec![0; 4])), "indices");
        refused(run(&table(&gpu, 4, vec![0; 3])), "indices");
        refused(run(&table(&other, 4, vec![0; 4])), "indices");
        let pair = gpu.cuda.clone_htod(&[1u64, 2]).unwrap();
        let pair = pair.tensor(&other.cuda, &[2]).unwrap();
        let call = outputs.with(&gpu, |samples| {
            let options = SamplingOptions::with_random(Random::Device(pair.view()));
            sample(&gpu, samples, &probs, &Filter::None, &options)
        });
        refused(call, "random");
    }
    other.synchronize();
    assert_eq!(outputs.tokens(&gpu), vec![-7; 4]);
    let call = outputs.with(&gpu, |samples| {
        sampling::sampling_from_probs(&gpu.stream, samples, &probs.device_view(), &good)
    });
    call.unwrap();
    assert!(outputs.download(&gpu).iter().all(Option::is_some));
}
