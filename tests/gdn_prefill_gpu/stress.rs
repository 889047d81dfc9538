//! GDN prefill under load: batches, streams and chains that made other
//! callers of this kernel hang. Each test compares output and states with the
//! CPU reference, under a watchdog.

use std::thread;

use crate::common::{
    Gpu, Number, Rng,
    gdn::{Case, Expected, Problem, Results, Start, watched},
};
use flashinfer_rs::gdn::GdnWorkspace;
use half::{bf16, f16};

/// Lengths below, at and above the kernel's tile of 64 tokens.
const MIXED: [usize; 8] = [1, 63, 64, 65, 127, 128, 129, 33];

/// One batch, once.
fn once<T: Number>(gpu: &Gpu, rng: &mut Rng, case: &Case) {
    let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
    Problem::<T>::random(gpu, rng, case).check(gpu, &workspace, &format!("{case:?}"));
}

/// The references of several problems at once, each in a thread.
fn expected<T: Number>(problems: &[Problem<T>]) -> Vec<Expected> {
    thread::scope(|scope| {
        let threads: Vec<_> =
            problems.iter().map(|problem| scope.spawn(move || problem.expected())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn stress_gdn_prefill_mixed_seqlens() {
    watched(|gpu, rng| {
        once::<f16>(gpu, rng, &Case::new(&MIXED, [4, 2, 2]));
        once::<bf16>(gpu, rng, &Case::new(&MIXED, [2, 2, 4]));
    });
}

#[test]
fn stress_gdn_prefill_many_single_token_seqs() {
    watched(|gpu, rng| {
        once::<f16>(gpu, rng, &Case::new(&[1; 256], [2, 2, 4]));
        once::<f16>(gpu, rng, &Case { state: true, ..Case::new(&[1; 128], [4, 4, 4]) });
    });
}

/// 50 launches one after the other; nobody waits for any of them.
#[test]
fn stress_gdn_prefill_rapid_fire_no_sync() {
    watched(|gpu, rng| {
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let problems: Vec<Problem<f16>> = [&[70, 1, 64][..], &[5], &[1, 1, 1, 1], &[128], &[63, 66]]
            .map(|lens| Problem::random(gpu, rng, &Case::new(lens, [2, 2, 4])))
            .into();
        let tables: Vec<_> = problems.iter().map(|problem| problem.case.table(gpu)).collect();
        let mut results: Vec<_> =
            problems.iter().cycle().take(50).map(|problem| Results::poisoned(gpu, &problem.case)).collect();
        gpu.synchronize();
        for (launch, results) in results.iter_mut().enumerate() {
            let at = launch % problems.len();
            problems[at].run(&workspace, &tables[at], Start::Zeros, results).unwrap();
        }
        let expected = expected(&problems);
        for (launch, results) in results.iter().enumerate() {
            let at = launch % problems.len();
            problems[at].verify(&format!("launch {launch}"), results, &expected[at]);
        }
    });
}

#[test]
fn stress_gdn_prefill_all_options_gqa() {
    watched(|gpu, rng| once::<f16>(gpu, rng, &Case::all_options(&[100, 64, 7, 130], [8, 2, 2])));
}

#[test]
fn stress_gdn_prefill_all_options_gva() {
    watched(|gpu, rng| once::<f16>(gpu, rng, &Case::all_options(&[100, 64, 7, 130], [2, 2, 8])));
}

/// 20 steps, each from the state that the one before left on the device.
#[test]
fn stress_gdn_prefill_state_chain_with_gates() {
    watched(|gpu, rng| {
        let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
        let cases: Vec<_> = (0..20).map(|step| Case::new(&[1 + step * 7 % 70, 40], [2, 2, 4])).collect();
        let problems: Vec<Problem<f16>> = cases.iter().map(|case| Problem::random(gpu, rng, case)).collect();
        let tables: Vec<_> = cases.iter().map(|case| case.table(gpu)).collect();
        let mut results: Vec<Results<f16>> = Vec::new();
        for (problem, table) in problems.iter().zip(&tables) {
            let mut next = Results::poisoned(gpu, &problem.case);
            let start = results.last().map_or(Start::Zeros, |last| Start::From(&last.state));
            problem.run(&workspace, table, start, &mut next).unwrap();
            results.push(next);
        }
        let mut state = None;
        for (step, (problem, results)) in problems.iter().zip(&results).enumerate() {
            let expected = problem.expected_from(state);
            problem.verify(&format!("step {step}"), results, &expected);
            state = Some(expected.state);
        }
    });
}

/// Four streams with a batch each, launched in turn, three times.
#[test]
fn stress_gdn_prefill_multi_stream() {
    watched(|gpu, rng| {
        let gpus: Vec<Gpu> = (0..4).map(|_| gpu.fork()).collect();
        let workspaces: Vec<_> = gpus.iter().map(|gpu| GdnWorkspace::new(&gpu.stream).unwrap()).collect();
        let cases = [
            Case::new(&[129, 1, 30], [4, 2, 2]),
            Case::all_options(&[64, 65], [2, 2, 4]),
            Case { alpha: false, ..Case::new(&[1; 40], [4, 4, 4]) },
            Case { beta: false, state: true, ..Case::new(&[63, 10, 70], [1, 1, 2]) },
        ];
        let problems: Vec<Problem<f16>> =
            gpus.iter().zip(&cases).map(|(gpu, case)| Problem::random(gpu, rng, case)).collect();
        let tables: Vec<_> = gpus.iter().zip(&cases).map(|(gpu, case)| case.table(gpu)).collect();
        let mut results: Vec<_> =
            (0..12).map(|launch| Results::poisoned(&gpus[launch % 4], &cases[launch % 4])).collect();
        for (launch, results) in results.iter_mut().enumerate() {
            let at = launch % 4;
            problems[at].run(&workspaces[at], &tables[at], problems[at].start(), results).unwrap();
        }
        let expected = expected(&problems);
        for (launch, results) in results.iter().enumerate() {
            let at = launch % 4;
            problems[at].verify(&format!("stream {at}, launch {launch}"), results, &expected[at]);
        }
    });
}

#[test]
fn stress_gdn_prefill_gqa_head_ratios() {
    watched(|gpu, rng| {
        for (q, kv) in [(4, 1), (6, 2), (8, 2), (8, 4), (16, 4)] {
            once::<f16>(gpu, rng, &Case::new(&[66, 3], [q, kv, kv]));
        }
    });
}

#[test]
fn stress_gdn_prefill_gva_head_ratios() {
    watched(|gpu, rng| {
        for (qk, v) in [(1, 2), (2, 4), (4, 8), (16, 32)] {
            once::<f16>(gpu, rng, &Case::new(&[66, 3], [qk, qk, v]));
        }
    });
}

/// 64 sequences of one token, and one of 1024.
#[test]
fn stress_gdn_prefill_extreme_disparity() {
    watched(|gpu, rng| {
        let mut lens = vec![1; 65];
        lens[32] = 1024;
        once::<f16>(gpu, rng, &Case::new(&lens, [2, 2, 4]));
    });
}

#[test]
fn stress_gdn_prefill_bf16_gva_all_options() {
    watched(|gpu, rng| once::<bf16>(gpu, rng, &Case::all_options(&[65, 1, 200, 64], [2, 2, 4])));
}

/// The heads of Qwen3-Next, on four streams, each with a chain of three steps
/// that replace their states in place.
#[test]
fn stress_gdn_prefill_qwen3_next_multi_stream_chained() {
    const STEPS: usize = 3;
    watched(|gpu, rng| {
        let gpus: Vec<Gpu> = (0..4).map(|_| gpu.fork()).collect();
        let workspaces: Vec<_> = gpus.iter().map(|gpu| GdnWorkspace::new(&gpu.stream).unwrap()).collect();
        let case = |stream: usize, step: usize| Case::new(&[60 + 3 * stream + step, 1], [16, 16, 32]);
        let problems: Vec<Vec<Problem<bf16>>> = gpus
            .iter()
            .enumerate()
            .map(|(stream, gpu)| {
                (0..STEPS).map(|step| Problem::random(gpu, rng, &case(stream, step))).collect()
            })
            .collect();
        let tables: Vec<Vec<_>> = gpus
            .iter()
            .zip(&problems)
            .map(|(gpu, chain)| chain.iter().map(|problem| problem.case.table(gpu)).collect())
            .collect();
        // Output of each step; the state is handed on from one to the next.
        let mut results: Vec<Vec<Results<bf16>>> = (0..4).map(|_| Vec::new()).collect();
        for step in 0..STEPS {
            for (stream, gpu) in gpus.iter().enumerate() {
                let problem = &problems[stream][step];
                let mut next = Results::poisoned(gpu, &problem.case);
                let start = match results[stream].last_mut() {
                    Some(last) => {
                        std::mem::swap(&mut last.state, &mut next.state);
                        Start::InPlace
                    }
                    None => Start::Zeros,
                };
                problem.run(&workspaces[stream], &tables[stream][step], start, &mut next).unwrap();
                results[stream].push(next);
            }
        }
        let expected: Vec<Vec<Expected>> = thread::scope(|scope| {
            let threads: Vec<_> = problems
                .iter()
                .map(|chain| {
                    scope.spawn(move || {
                        let mut steps: Vec<Expected> = Vec::new();
                        for problem in chain {
                            let state = steps.last().map(|last| last.state.clone());
                            steps.push(problem.expected_from(state));
                        }
                        steps
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for stream in 0..gpus.len() {
            for step in 0..STEPS {
                let (problem, results) = (&problems[stream][step], &results[stream][step]);
                let what = format!("stream {stream}, step {step}");
                let expected = &expected[stream][step];
                problem.verify_output(&what, results, expected);
                if step == STEPS - 1 {
                    problem.verify_state(&what, results, expected);
                }
            }
        }
    });
}
