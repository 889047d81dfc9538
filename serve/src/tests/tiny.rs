//! Small files.

use super::*;

/// A small file, of this metadata and tensors of these shapes.
pub struct Tiny {
    pub metadata: BTreeMap<&'static str, Value>,
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// The elements of a tensor, by its name, shape and their place.
    pub value: fn(&str, &[usize], usize) -> f32,
}

/// In what small files differ. Heads are 64 wide, and as many as a row has room for.
pub struct Sizes {
    pub layers: usize,
    pub vocab: usize,
    pub hidden: usize,
    pub inner: usize,
    pub kv_heads: usize,
}

impl Tiny {
    /// A model of one layer and one head of 64.
    pub fn new() -> Self {
        Self::sized(Sizes { layers: 1, vocab: 32, hidden: 64, inner: 96, kv_heads: 1 })
    }

    /// A model of these sizes. Elements are a function of their place, twice that in an output
    /// head. What divides frequencies counts from 1.
    pub fn sized(Sizes { layers, vocab, hidden, inner, kv_heads }: Sizes) -> Self {
        let (heads, kv) = (hidden / 64, 64 * kv_heads);
        let mut metadata = BTreeMap::from([
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", Value::U32(layers as u32)),
            ("llama.context_length", Value::U32(64)),
            ("llama.embedding_length", Value::U32(hidden as u32)),
            ("llama.feed_forward_length", Value::U32(inner as u32)),
            ("llama.attention.head_count", Value::U32(heads as u32)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ]);
        if kv_heads != heads {
            metadata.insert("llama.attention.head_count_kv", Value::U32(kv_heads as u32));
        }
        let of_layer = [
            ("attn_norm", vec![hidden]),
            ("attn_q", vec![hidden, hidden]),
            ("attn_k", vec![kv, hidden]),
            ("attn_v", vec![kv, hidden]),
            ("attn_output", vec![hidden, hidden]),
            ("ffn_norm", vec![hidden]),
            ("ffn_gate", vec![inner, hidden]),
            ("ffn_up", vec![inner, hidden]),
            ("ffn_down", vec![hidden, inner]),
        ];
        let mut tensors = BTreeMap::from([
            ("token_embd.weight".to_owned(), vec![vocab, hidden]),
            ("output_norm.weight".to_owned(), vec![hidden]),
        ]);
        for layer in 0..layers {
            let named = |(name, shape): &(_, Vec<_>)| (format!("blk.{layer}.{name}.weight"), shape.clone());
            tensors.extend(of_layer.iter().map(named));
        }
        let value = |name: &str, _: &[usize], at: usize| match name {
            "rope_freqs.weight" => 1.0 + at as f32,
            "output.weight" => (at as f32 * 0.7).sin() * 0.5,
            _ => (at as f32 * 0.7).sin() * 0.25,
        };
        Self { metadata, tensors, value }
    }

    /// The tokenizer that the metadata describes.
    pub fn text(&self) -> crate::Result<Arc<Text>> {
        let content = gguf_file::Content {
            magic: gguf_file::VersionedMagic::GgufV3,
            metadata: self.metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect(),
            tensor_infos: std::collections::HashMap::new(),
            tensor_data_offset: 0,
        };
        Text::from_gguf(&content).map(Arc::new)
    }

    pub fn write(&self, folder: &TempDir) -> PathBuf {
        let tensor = |name: &str, shape: &[usize]| {
            let values: Vec<_> =
                (0..shape.iter().product()).map(|at| (self.value)(name, shape, at)).collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
        };
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, shape)| (name.as_str(), tensor(name, shape))).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (*key, value)).collect();
        let path = folder.path().join("tiny.gguf");
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        path
    }
}

/// The engine for a file, or why there is none.
pub fn engine(path: &Path) -> Result<Cpu> {
    let model = Model::open(path)?;
    let pool = PageAllocator::new(4, 4)?;
    Cpu::new(&model.config, model.ends()?, model.layers(), &pool)
}

impl Tiny {
    /// The logits of three tokens, but for the second's.
    pub fn logits(&self, folder: &TempDir) -> Vec<f32> {
        let mut cpu = engine(&self.write(folder)).unwrap();
        let pool = PageAllocator::new(4, 4).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([3]).unwrap();
        let outputs = [0, 2].map(Output::greedy);
        cpu.step(&Step { batch: &batch, tokens: &StepToken::known(&[5, 0, 31]), outputs: &outputs }).unwrap();
        cpu.logits().unwrap()
    }
}
