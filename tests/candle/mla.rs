//! Latent attention of candle's tensors against plain softmax attention: on the CPU always, on a
//! GPU with `FLASHINFER_RS_RUN_GPU_TESTS=1`.
use crate::candle_common::{Plain, Rng, assert_close, assert_lse, devices, dtypes, on_host, random, refused};
use candle_core::{DType, Device, Tensor};
use flashinfer_rs::{
    attention::MlaSpec,
    candle::{PagedCache, PagedMla, StepTables},
    kv::{Batch, HeadsShape, KvLayout, LatentShape, PageAllocator, Sequence},
};

const LAYERS: usize = 2;
const HEADS: usize = 16;
const SCALE: f64 = 0.07;

/// A cache of latent rows, what computes on it, and what each request's rows are on the host.
struct Rig {
    device: Device,
    dtype: DType,
    cache: PagedCache,
    tables: StepTables,
    mla: PagedMla,
    batch: Batch,
    expected: Vec<[Tensor; LAYERS]>,
}

impl Rig {
    fn new(device: &Device, dtype: DType, page_size: usize) -> Self {
        let pool = PageAllocator::new(64, page_size).unwrap();
        let shape = LatentShape { num_layers: LAYERS, dtype: dtype.try_into().unwrap() };
        Self {
            device: device.clone(),
            dtype,
            cache: PagedCache::new(device, &pool, shape).unwrap(),
            tables: StepTables::new(device),
            mla: PagedMla::new(device, &MlaSpec::new(dtype.try_into().unwrap(), SCALE), HEADS).unwrap(),
            batch: Batch::new(&pool),
            expected: Vec::new(),
        }
    }

    fn push(&mut self) {
        self.batch.push(Sequence::new(self.batch.allocator())).unwrap();
        let none = || Tensor::zeros((0, 1, 576), DType::F32, &Device::Cpu).unwrap();
        self.expected.push([none(), none()]);
    }

    fn fork(&mut self, request: usize) {
        self.batch.push(self.batch.sequences()[request].fork()).unwrap();
        self.expected.push(self.expected[request].clone());
    }

    /// Appends random tokens, and compares results and LSE of each layer.
    fn step(&mut self, rng: &mut Rng, new: &[usize], causal: bool) {
        let Self { device, dtype, cache, tables, mla, batch, expected } = self;
        let total = new.iter().sum::<usize>();
        batch.append(new.iter().copied()).unwrap();
        let step = tables.update(batch, cache).unwrap();
        let plan = mla.plan(&step, causal).unwrap();
        (0..LAYERS).for_each(|layer| {
            let q = random(rng, &[total, HEADS, 576], *dtype, device);
            let rows = random(rng, &[total, 576], *dtype, device);
            let (ckv, kpe) = (rows.narrow(1, 0, 512).unwrap(), rows.narrow(1, 512, 64).unwrap());
            cache.append_latent(&step, layer, &ckv, &kpe).unwrap();
            let (nope, pe) = (q.narrow(2, 0, 512).unwrap(), q.narrow(2, 512, 64).unwrap());
            let out = plan.run(&nope, &pe, cache, layer).unwrap();
            // The same of tensors without gaps.
            let [nope, pe] = [nope, pe].map(|part| part.contiguous().unwrap());
            let (again, lse) = plan.run_with_lse(&nope, &pe, cache, layer).unwrap();
            let mut start = 0;
            for (request, &len) in new.iter().enumerate() {
                let part = |all: &Tensor| on_host(all).narrow(0, start, len).unwrap();
                let all = &mut expected[request][layer];
                *all = Tensor::cat(&[&*all, &part(&rows).unsqueeze(1).unwrap()], 0).unwrap();
                let plain = Plain { causal, scale: Some(SCALE), ..Plain::default() };
                let values = all.narrow(2, 0, 512).unwrap();
                if len > 0 {
                    let [plain, plain_lse] = plain.attention_and_lse(&part(&q), all, &values);
                    let what = format!("request {request}, layer {layer}, {dtype:?} on {device:?}");
                    for out in [&out, &again] {
                        assert_close(&out.narrow(0, start, len).unwrap(), &plain, &what);
                    }
                    assert_lse(&lse.narrow(0, start, len).unwrap(), &plain_lse, &what);
                }
                start += len;
            }
        });
    }
}

/// Chunks of prompts, then single tokens; of two sequences that share pages, each goes on by itself.
#[test]
fn chunks_forks_and_decode() {
    let mut rng = Rng::new();
    for device in devices() {
        for (&dtype, page_size) in dtypes(&device).iter().zip([5, 16, 64]) {
            let mut rig = Rig::new(&device, dtype, page_size);
            (0..3).for_each(|_| rig.push());
            rig.step(&mut rng, &[7, 0, 18], true);
            rig.step(&mut rng, &[2, 9, 1], false);
            rig.fork(2);
            rig.step(&mut rng, &[1, 1, 1, 1], true);
            rig.step(&mut rng, &[1, 3, 2, 1], true);
        }
    }
}

#[test]
fn wrong_input_is_refused() {
    for device in devices() {
        let dtype = dtypes(&device)[0];
        let mut rig = Rig::new(&device, dtype, 16);
        rig.push();
        rig.batch.append([3]).unwrap();
        let step = rig.tables.update(&rig.batch, &mut rig.cache).unwrap();
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device).unwrap();
        let (nope, pe) = (zeros(&[3, HEADS, 512], dtype), zeros(&[3, HEADS, 64], dtype));
        let (ckv, kpe) = (zeros(&[3, 512], dtype), zeros(&[3, 64], dtype));
        refused(rig.cache.append_latent(&step, 0, &kpe, &ckv), &["ckv", "shape"]);
        refused(rig.cache.append_latent(&step, 0, &ckv, &zeros(&[2, 64], dtype)), &["kpe", "shape"]);
        refused(rig.cache.append_latent(&step, LAYERS, &ckv, &kpe), &["layer"]);
        let plan = rig.mla.plan(&step, true).unwrap();
        refused(plan.run(&pe, &nope, &rig.cache, 0), &["q_nope", "shape"]);
        refused(plan.run(&nope, &zeros(&[3, HEADS, 32], dtype), &rig.cache, 0), &["q_pe", "shape"]);
        refused(plan.run(&nope, &zeros(&[3, HEADS, 64], DType::BF16), &rig.cache, 0), &["q_pe", "dtype"]);
        refused(plan.run(&nope, &pe, &rig.cache, LAYERS), &["layer"]);
        // A cache of heads.
        let pool = PageAllocator::new(4, 16).unwrap();
        let layout = KvLayout::Nhd;
        let heads = HeadsShape {
            num_layers: 1,
            num_kv_heads: 1,
            head_dim: 64,
            dtype: dtype.try_into().unwrap(),
            layout,
        };
        let mut heads = PagedCache::new(&device, &pool, heads).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([3]).unwrap();
        let mut tables = StepTables::new(&device);
        let step = tables.update(&batch, &mut heads).unwrap();
        let plan = rig.mla.plan(&step, true).unwrap();
        refused(plan.run(&nope, &pe, &heads, 0), &["cache", "it has heads"]);
        refused(heads.append_latent(&step, 0, &ckv, &kpe), &["cache", "it has heads"]);

        let spec = MlaSpec::new(dtype.try_into().unwrap(), SCALE);
        refused(PagedMla::new(&device, &spec, 0), &["num_heads"]);
        let no_number = MlaSpec::new(dtype.try_into().unwrap(), f64::NAN);
        refused(PagedMla::new(&device, &no_number, HEADS), &["sm_scale", "NaN"]);
        let mut other = spec;
        other.head_dim_ckv = 256;
        refused(PagedMla::new(&device, &other, HEADS), &["256 and 64", "512 and 64"]);
        let wrong = MlaSpec::new(flashinfer_rs::DType::E4M3, SCALE);
        refused(PagedMla::new(&device, &wrong, HEADS), &["dtype"]);
        let eight = LatentShape { num_layers: 1, dtype: flashinfer_rs::DType::E4M3 };
        refused(PagedCache::new(&device, &PageAllocator::new(4, 16).unwrap(), eight), &["dtype"]);
    }
}
