//! Out of memory wherever the GPU's is asked for, and kernels of others that fail.

use std::{collections::BTreeSet, time::Instant};

use cudarc::driver::{CudaContext, LaunchConfig};
use test_support::{alone::is_alone, ballast::Ballast};

use super::*;
use crate::{Llm, LlmOptions, engine::Health};

/// What the GPU is left more of from one round to the next.
const STEP: usize = 48 << 20;
/// The most rounds: with as much memory as the last one leaves, everything succeeds.
const ROUNDS: usize = 80;

/// What a model says where the GPU has so much memory, or how it fails; and what it says once there is more.
fn answers(loaded: &Loaded, context: &CudaContext, left: usize) -> Result<[Option<Finish>; 2]> {
    let pool = PageAllocator::new(64, 16)?;
    let ballast = Ballast::leaving(context, left);
    let layers = loaded.layers.iter().cloned().map(Ok);
    let options = GpuOptions::new(64);
    let mut gpu = Gpu::new(&loaded.model.config, loaded.ends.clone(), layers, &pool, options)?;
    let mut ask = || {
        let mut requests = Requests::new(&pool, gpu.vocab_size(), limits(64, 0));
        for (prompt, expected) in [CHAT, STORY] {
            requests.submit(prompt, &greedy(expected.len())).unwrap();
        }
        requests.finish(&mut gpu);
        for (request, (_, expected)) in [CHAT, STORY].into_iter().enumerate() {
            let ids = requests.answer(request).ids();
            assert_eq!(ids[..], expected[..ids.len()], "{left} bytes");
        }
        requests.answer(1).finish.clone()
    };
    let while_scarce = ask();
    drop(ballast);
    Ok([while_scarce, ask()])
}

#[test]
fn out_of_memory_is_an_error_wherever_it_happens() {
    let Some(_turn) = turn() else { return };
    let loaded = loaded().expect("the pinned model");
    let context = CudaContext::new(0).unwrap();
    // What is there but once is loaded with memory at hand.
    assert_eq!(
        answers(loaded, &context, usize::MAX >> 1).unwrap(),
        [Some(Finish::MaxTokens), Some(Finish::MaxTokens)]
    );
    let (mut reasons, mut whole) = (BTreeSet::new(), 0);
    for left in (0..ROUNDS).map(|round| round * STEP) {
        match answers(loaded, &context, left) {
            Err(error) => drop(reasons.insert(format!("loading: {error}"))),
            Ok([scarce, later]) => {
                match scarce {
                    Some(Finish::Failed(reason)) => drop(reasons.insert(format!("a step: {reason}"))),
                    scarce => {
                        assert_eq!(scarce, Some(Finish::MaxTokens));
                        whole += 1;
                    }
                }
                assert_eq!(later, Some(Finish::MaxTokens), "{left} bytes: with memory again");
            }
        }
        if whole == 3 {
            break;
        }
    }
    eprintln!("with too little memory: {reasons:#?}");
    assert!(reasons.iter().any(|reason| reason.to_lowercase().contains("out of memory")), "{reasons:?}");
    assert_eq!(whole, 3);
}

/// After an illegal address of another kernel, requests are errors that come soon, and the engine says that it
/// is unwell.
#[test]
fn an_engine_whose_gpu_failed_says_so() {
    // Waits until no other test is on the GPU.
    let Some(_turn) = turn() else { return };
    if !is_alone("tests::gpu::faults::an_engine_whose_gpu_failed_says_so") {
        return;
    }
    let store = Store::open(hub::store_config().unwrap()).unwrap();
    let path = store.locate(&hub::smollm2(), Fetch::Allowed).unwrap().path;
    let llm = Llm::load(&[path], &LlmOptions { device: Place::Gpu, ..LlmOptions::default() }).unwrap();
    let ask =
        || llm.generate("Once upon a time", &greedy(20)).map(|mut answers| answers.remove(0).end.finish);
    assert_eq!(ask().unwrap(), Finish::MaxTokens);

    let context = CudaContext::new(0).unwrap();
    let writes = ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry fails() {\n\
                  .reg .u64 %a; .reg .u32 %b; mov.u64 %a, 16; mov.u32 %b, 1; st.global.u32 [%a], %b; ret; }";
    let module = context.load_module(cudarc::nvrtc::Ptx::from_src(writes)).unwrap();
    let (kernel, stream) = (module.load_function("fails").unwrap(), context.new_stream().unwrap());
    // SAFETY: it takes no arguments, and is to fail.
    unsafe { stream.launch_builder(&kernel).launch(LaunchConfig::for_num_elems(1)) }.unwrap();
    stream.synchronize().unwrap_err();

    for _ in 0..3 {
        let begin = Instant::now();
        let reason = ask().expect_err("an answer of a GPU that failed").to_string();
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        assert!(reason.to_lowercase().contains("illegal"), "{reason}");
    }
    let health = llm.engine().status().health;
    assert!(
        matches!(&health, Health::Unwell(reason) | Health::Dead(reason) if reason.to_lowercase().contains("illegal")),
        "{health:?}"
    );
    // It ends in the time that it is given, though nothing on the GPU can be freed.
    let begin = Instant::now();
    drop(llm);
    assert!(begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
    // The threads of CUDA's own libraries may not outlive what failed.
    eprintln!("test result: ok. 1 passed");
    std::process::exit(0);
}
