//! A decode step of candle's tensors, captured into a CUDA graph and launched with other lengths,
//! against the same step as it is, and against plain softmax attention: on a GPU with
//! `FLASHINFER_RS_RUN_GPU_TESTS=1`.
use crate::candle_common::{Plain, Rng, assert_close, dtypes, gpus, on_host, random, refused};
use candle_core::{DType, Device, Result, Tensor};
use flashinfer_rs::{
    attention::{AttentionSpec, Heads},
    candle::{PagedCache, PagedDecode, RotaryEmbedding, Step, StepTables, capture_step, rms_norm, rope},
    kv::{Batch, BatchCapacity, HeadsShape, KvLayout, PageAllocator, Sequence},
    rope::{RopeFrequencies, RopeScaling},
};

const LAYERS: usize = 2;
const REQUESTS: usize = 3;
const HEADS: Heads = Heads::new(4, 2);
const HEAD_DIM: usize = 64;
const HIDDEN: usize = 96;
const CAPACITY: BatchCapacity = BatchCapacity { requests: REQUESTS, pages: 64, tokens: 256 };

/// A GPU with candle's default stream, and with one of its own, on which cudarc waits for no events.
fn devices() -> Vec<Device> {
    let devices = gpus();
    #[cfg(feature = "candle-cuda")]
    if let Some(Device::Cuda(device)) = devices.get(1) {
        // SAFETY: no tensor of the device is there yet, and all of them are used on its stream.
        unsafe { device.disable_event_tracking() };
    }
    devices
}

/// What a decode step works on. All of it outlives what is captured.
struct Model {
    norm: Tensor,
    projections: [Tensor; LAYERS],
    rotary: RotaryEmbedding,
    /// Of each request, changed in place.
    hidden: Tensor,
    /// Of each layer.
    out: [Tensor; LAYERS],
}

impl Model {
    fn new(rng: &mut Rng, device: &Device, dtype: DType) -> Self {
        let width = (HEADS.num_qo_heads + 2 * HEADS.num_kv_heads) * HEAD_DIM;
        let frequencies = RopeFrequencies::new(HEAD_DIM, 1e4, &RopeScaling::None).unwrap();
        let out = || Tensor::zeros((REQUESTS, HEADS.num_qo_heads, HEAD_DIM), dtype, device).unwrap();
        Self {
            norm: random(rng, &[HIDDEN], dtype, device),
            projections: [(); LAYERS].map(|()| random(rng, &[HIDDEN, width], dtype, device)),
            rotary: RotaryEmbedding::new(device, &frequencies, 512).unwrap(),
            hidden: Tensor::zeros((REQUESTS, HIDDEN), dtype, device).unwrap(),
            out: [out(), out()],
        }
    }

    /// Queries, keys and values of a layer: candle's multiplication between this crate's norm and
    /// embedding.
    fn qkv(&self, layer: usize, step: &Step<'_>) -> Result<[Tensor; 3]> {
        let scale = 0.02;
        let rows = (rms_norm(&self.hidden, &self.norm, 1e-6)?.matmul(&self.projections[layer])? * scale)?;
        let heads = rows.reshape((REQUESTS, (), HEAD_DIM))?;
        let (qo, kv) = (HEADS.num_qo_heads, HEADS.num_kv_heads);
        let (q, k) = rope(&heads.narrow(1, 0, qo)?, &heads.narrow(1, qo, kv)?, &self.rotary, step)?;
        Ok([q, k, heads.narrow(1, qo + kv, kv)?])
    }
}

#[test]
fn the_cpu_has_no_graphs() {
    // SAFETY: nothing is captured.
    let step = unsafe { capture_step(&Device::Cpu, || panic!("it was run")) };
    refused(step, &["device", "CUDA has graphs"]);
}

/// Events of cudarc's would break the capture; the error says what to do.
#[test]
fn streams_with_events_are_refused() {
    let devices = gpus();
    let Some(device) = devices.get(1) else { return };
    // SAFETY: nothing is captured.
    let step = unsafe { capture_step(device, || panic!("it was run")) };
    refused(step, &["events", "disable_event_tracking"]);
}

/// What fails in it ends the capture, and the stream can be used again.
#[test]
fn a_body_that_fails() {
    for device in devices() {
        let mut runs = 0;
        let body = || {
            runs += 1;
            if runs == 2 { candle_core::bail!("on purpose") } else { Ok(()) }
        };
        // SAFETY: it works on nothing.
        refused(unsafe { capture_step(&device, body) }, &["on purpose"]);
        let one = Tensor::ones(4, DType::F32, &device).unwrap();
        assert_eq!(one.sum_all().unwrap().to_scalar::<f32>().unwrap(), 4.0);
    }
}

#[test]
fn launches_with_other_lengths() {
    let mut rng = Rng::new();
    for device in devices() {
        for &dtype in dtypes(&device) {
            let pool = PageAllocator::new(64, 16).unwrap();
            let shape = HeadsShape {
                num_layers: LAYERS,
                num_kv_heads: HEADS.num_kv_heads,
                head_dim: HEAD_DIM,
                dtype: dtype.try_into().unwrap(),
                layout: KvLayout::Nhd,
            };
            let mut cache = PagedCache::new(&device, &pool, shape).unwrap();
            let spec = AttentionSpec::new(dtype.try_into().unwrap(), HEAD_DIM);
            let mut decode = PagedDecode::new(&device, &spec, HEADS).unwrap();
            let mut eager = PagedDecode::new(&device, &spec, HEADS).unwrap();
            let mut tables = StepTables::with_capacity(&device, CAPACITY);
            let mut batch = Batch::new(&pool);
            (0..REQUESTS).for_each(|_| batch.push(Sequence::new(&pool)).unwrap());
            let model = Model::new(&mut rng, &device, dtype);

            // Prompts of random keys and values, which are kept on the host, too.
            let prompts = [5, 40, 17];
            batch.append(prompts).unwrap();
            let step = tables.update(&batch, &mut cache).unwrap();
            let kv_shape = [prompts.iter().sum(), HEADS.num_kv_heads, HEAD_DIM];
            let mut expected = Vec::new();
            for layer in 0..LAYERS {
                let [k, v] = [(); 2].map(|()| random(&mut rng, &kv_shape, dtype, &device));
                cache.append(&step, layer, &k, &v).unwrap();
                let mut start = 0;
                let requests = prompts.map(|len| {
                    start += len;
                    [&k, &v].map(|all| on_host(all).narrow(0, start - len, len).unwrap())
                });
                expected.push(requests);
            }

            let mut captured = None;
            for launch in 0..40 {
                batch.append([1; REQUESTS]).unwrap();
                let hidden = random(&mut rng, &[REQUESTS, HIDDEN], dtype, &device);
                model.hidden.slice_set(&hidden, 0, 0).unwrap();
                let step = tables.update(&batch, &mut cache).unwrap();
                let plan = decode.plan_for_graph(&step).unwrap();
                match &captured {
                    None => {
                        let body = || {
                            (0..LAYERS).try_for_each(|layer| {
                                let [q, k, v] = model.qkv(layer, &step)?;
                                cache.append(&step, layer, &k, &v)?;
                                model.out[layer].slice_set(&plan.run(&q, &cache, layer)?, 0, 0)
                            })
                        };
                        // SAFETY: model and cache are dropped after it, and in this thread.
                        captured = Some(unsafe { capture_step(&device, body) }.unwrap());
                    }
                    Some(captured) => {
                        // What a launch leaves out would be seen.
                        for out in &model.out {
                            let nan = Tensor::full(f32::NAN, out.shape(), &device).unwrap();
                            out.slice_set(&nan.to_dtype(dtype).unwrap(), 0, 0).unwrap();
                        }
                        captured.launch(&plan).unwrap();
                    }
                }
                drop(plan);
                let plan = eager.plan(&step).unwrap();
                for (layer, requests) in expected.iter_mut().enumerate() {
                    let [q, k, v] = model.qkv(layer, &step).unwrap();
                    let what = format!("launch {launch}, layer {layer}, {dtype:?} on {device:?}");
                    assert_close(&model.out[layer], &on_host(&plan.run(&q, &cache, layer).unwrap()), &what);
                    for (request, kept) in requests.iter_mut().enumerate() {
                        let row = |all: &Tensor| on_host(all).narrow(0, request, 1).unwrap();
                        for (all, new) in kept.iter_mut().zip([&k, &v]) {
                            *all = Tensor::cat(&[&*all, &row(new)], 0).unwrap();
                        }
                        let plain = Plain { causal: true, ..Plain::default() };
                        let out = model.out[layer].narrow(0, request, 1).unwrap();
                        assert_close(&out, &plain.attention(&row(&q), &kept[0], &kept[1]), &what);
                    }
                }
            }

            // Fewer requests, and plans that are not for a graph, are refused: nothing is launched.
            let captured = captured.unwrap();
            batch.append([1; REQUESTS]).unwrap();
            let step = tables.update(&batch, &mut cache).unwrap();
            let error = captured.launch(&decode.plan(&step).unwrap()).unwrap_err().to_string();
            assert!(error.contains("plans"), "{error}");
            batch.remove(0).unwrap();
            batch.append([1; REQUESTS - 1]).unwrap();
            let step = tables.update(&batch, &mut cache).unwrap();
            let error = captured.launch(&decode.plan_for_graph(&step).unwrap()).unwrap_err().to_string();
            assert!(error.contains("2 requests"), "{error}");
        }
    }
}
