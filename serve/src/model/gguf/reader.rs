//! The head of a GGUF file, versions 2 and 3: metadata, and where tensors are.

use std::{
    collections::{HashMap, HashSet},
    io::Read,
};

use candle_core::quantized::{GgmlDType, gguf_file::Value};

use super::integer;

const MAGIC: &[u8] = b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
/// Where a file does not say it.
const ALIGNMENT: u64 = 32;
const MOST_DIMENSIONS: u32 = 4;
/// More than any vocabulary has, and so little that values fit in memory.
const MOST_ELEMENTS: u64 = 1 << 24;
const MOST_PARTS: i128 = 9999;

/// A problem, in words.
type Result<T> = std::result::Result<T, String>;

#[derive(Debug)]
pub struct TensorHeader {
    pub name: String,
    pub dtype: GgmlDType,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes start in the file.
    pub start: u64,
}

/// What comes before the tensors' bytes.
#[derive(Debug)]
pub struct Header {
    pub metadata: HashMap<String, Value>,
    /// All of them lie within the file.
    pub tensors: Vec<TensorHeader>,
}

impl Header {
    /// Reads the head of a file of `len` bytes.
    pub fn read(file: impl Read, len: u64) -> Result<Self> {
        let mut source = Source { file, len, at: 0 };
        if source.bytes(4, "the magic number")? != MAGIC {
            return Err("it does not start with GGUF".into());
        }
        let version = source.u32("the version")?;
        if version.swap_bytes() <= 0xffff && version > 0xffff {
            return Err("its numbers are big-endian; expected little-endian".into());
        }
        if !VERSIONS.contains(&version) {
            return Err(format!("its version is {version}; expected one of {VERSIONS:?}"));
        }
        let tensors = source.u64("the number of tensors")?;
        let keys = source.u64("the number of keys")?;
        let mut metadata = HashMap::new();
        for index in 0..keys {
            let key = source.string(&format!("key {index} of {keys}"))?;
            let kind = source.u32(&key)?;
            let value = source.value(&key, kind)?;
            if metadata.contains_key(&key) {
                return Err(format!("it has the key {key} twice"));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => match integer(value).and_then(|value| u32::try_from(value).ok()) {
                Some(value) if value.is_power_of_two() => value.into(),
                _ => return Err(format!("general.alignment is {value:?}; expected a power of two")),
            },
        };
        let mut names = HashSet::new();
        let mut unplaced = Vec::new();
        for index in 0..tensors {
            let tensor = source.tensor(&format!("tensor {index} of {tensors}"))?;
            if !names.insert(tensor.name.clone()) {
                return Err(format!("it has the tensor {} twice", tensor.name));
            }
            unplaced.push(tensor);
        }
        let data = source.at.next_multiple_of(alignment);
        let place = |tensor: TensorHeader| place(tensor, data, alignment, len);
        Ok(Self { metadata, tensors: unplaced.into_iter().map(place).collect::<Result<_>>()? })
    }

    /// Of how many parts this is one; 0 or 1 if it is whole.
    pub fn split_count(&self) -> Result<usize> {
        match self.metadata.get("split.count").map(|value| (value, integer(value))) {
            None => Ok(0),
            Some((_, Some(count @ 0..=MOST_PARTS))) => Ok(count as usize),
            Some((value, _)) => {
                Err(format!("split.count is {value:?}; expected a number up to {MOST_PARTS}"))
            }
        }
    }
}

/// Turns where a tensor starts among the tensors to where it starts in the file.
fn place(tensor: TensorHeader, data: u64, alignment: u64, len: u64) -> Result<TensorHeader> {
    let TensorHeader { name, dtype, shape, start: offset } = &tensor;
    let broken = |problem: String| Err(format!("tensor {name}: {problem}"));
    if !offset.is_multiple_of(alignment) {
        return broken(format!("its offset is {offset}; expected a multiple of {alignment}"));
    }
    let block = dtype.block_size();
    let columns = shape.last().copied().unwrap_or(1);
    if !columns.is_multiple_of(block) {
        return broken(format!("its rows have {columns} elements; {dtype:?} has blocks of {block}"));
    }
    let elements = shape.iter().try_fold(1u64, |all, &dim| all.checked_mul(dim as u64));
    let bytes = elements.and_then(|elements| (elements / block as u64).checked_mul(dtype.type_size() as u64));
    let Some(bytes) = bytes.filter(|&bytes| bytes <= isize::MAX as u64) else {
        return broken(format!("its shape is {shape:?}, which is larger than any memory"));
    };
    let start = data.saturating_add(*offset);
    if start.checked_add(bytes).is_none_or(|end| end > len) {
        return broken(format!("it needs {bytes} bytes from {start} on; the file has {len} bytes"));
    }
    Ok(TensorHeader { start, ..tensor })
}

/// What is left of a file.
struct Source<R> {
    file: R,
    len: u64,
    at: u64,
}

impl<R: Read> Source<R> {
    /// Checks that so many bytes are left, for what `what` names.
    fn check(&self, bytes: u64, what: &str) -> Result<()> {
        let left = self.len.saturating_sub(self.at);
        if bytes > left {
            return Err(format!("{what}: {bytes} bytes are needed, and {left} are left in the file"));
        }
        Ok(())
    }

    fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>> {
        self.check(count, what)?;
        let mut bytes = vec![0; count as usize];
        self.file.read_exact(&mut bytes).map_err(|e| format!("{what}: {e}"))?;
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.check(N as u64, what)?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(|e| format!("{what}: {e}"))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Text, which some files end with zeros, and which is not always UTF-8.
    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let bytes = self.bytes(len, what)?;
        let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// The value of a key.
    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(self.array::<1>(key)?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(self.u32(key)?),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array::<1>(key)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                byte => return Err(format!("{key} is {byte}; expected 0 or 1, as it is true or false")),
            },
            8 => Value::String(self.string(key)?),
            9 => self.values(key)?,
            10 => Value::U64(self.u64(key)?),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(format!("{key} has type {kind}; expected one up to 12")),
        })
    }

    fn values(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        // Of the smallest value of each type: strings have a length at least.
        let bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => {
                return Err(format!(
                    "{key} is an array of type {kind}; expected one up to 12, and no arrays"
                ));
            }
        };
        let len = self.u64(key)?;
        self.check(len.saturating_mul(bytes), key)?;
        if len > MOST_ELEMENTS {
            return Err(format!("{key} has {len} elements; expected at most {MOST_ELEMENTS}"));
        }
        Ok(Value::Array((0..len).map(|_| self.value(key, kind)).collect::<Result<_>>()?))
    }

    /// A tensor, whose start is that among the tensors.
    fn tensor(&mut self, what: &str) -> Result<TensorHeader> {
        let name = self.string(what)?;
        let broken = |problem: String| Err(format!("tensor {name}: {problem}"));
        let dimensions = self.u32(&name)?;
        if dimensions > MOST_DIMENSIONS {
            return broken(format!("it has {dimensions} dimensions; expected at most {MOST_DIMENSIONS}"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let dim = self.u64(&name)?;
            match usize::try_from(dim) {
                Ok(dim) if dim > 0 => shape.insert(0, dim),
                _ => return broken(format!("a dimension is {dim}")),
            }
        }
        let kind = self.u32(&name)?;
        let Some(dtype) = dtype(kind) else {
            let type_name =
                OTHER_TYPES.iter().find(|(of, _)| *of == kind).map_or("unknown", |(_, name)| name);
            return broken(format!("its type is {kind} ({type_name}), which this program does not read"));
        };
        Ok(TensorHeader { dtype, shape, start: self.u64(&name)?, name })
    }
}

/// The types of elements that candle multiplies.
fn dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Types of elements that other programs read.
const OTHER_TYPES: [(u32, &str); 24] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];
