//! Files that are broken are errors that say what is wrong, and no file, however
//! broken, makes the reader panic or allocate more than the file has.

use std::{fs, path::Path};

use candle_core::quantized::{GgmlDType, gguf_file::Value};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{Gguf, integer, reader::Header};

/// A tensor as a file's head has it: the innermost dimension first.
type Tensor<'a> = (&'a str, &'a [u64], u32, u64);

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn value(bytes: &mut Vec<u8>, value: &Value) {
    let mut number = |kind: u32, number: &[u8]| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(number);
    };
    match value {
        Value::U8(value) => number(0, &value.to_le_bytes()),
        Value::I8(value) => number(1, &value.to_le_bytes()),
        Value::U16(value) => number(2, &value.to_le_bytes()),
        Value::I16(value) => number(3, &value.to_le_bytes()),
        Value::U32(value) => number(4, &value.to_le_bytes()),
        Value::I32(value) => number(5, &value.to_le_bytes()),
        Value::F32(value) => number(6, &value.to_le_bytes()),
        Value::Bool(value) => number(7, &[u8::from(*value)]),
        Value::U64(value) => number(10, &value.to_le_bytes()),
        Value::I64(value) => number(11, &value.to_le_bytes()),
        Value::F64(value) => number(12, &value.to_le_bytes()),
        Value::String(text) => {
            number(8, &[]);
            string(bytes, text);
        }
        Value::Array(values) => {
            number(9, &8u32.to_le_bytes());
            bytes.extend((values.len() as u64).to_le_bytes());
            for value in values {
                string(bytes, value.to_string().unwrap());
            }
        }
    }
}

/// The head of a file.
fn head(metadata: &[(&str, Value)], tensors: &[Tensor<'_>]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, of) in metadata {
        string(&mut bytes, key);
        value(&mut bytes, of);
    }
    for (name, shape, kind, offset) in tensors {
        string(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes
}

/// A head and so many bytes of tensors, which count from 0.
fn file(metadata: &[(&str, Value)], tensors: &[Tensor<'_>], data: usize) -> Vec<u8> {
    let mut bytes = head(metadata, tensors);
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend((0..data).map(|at| at as u8));
    bytes
}

fn read(bytes: &[u8]) -> Result<Header, String> {
    Header::read(bytes, bytes.len() as u64)
}

#[track_caller]
fn refused(bytes: &[u8], expected: &str) {
    let problem = read(bytes).expect_err("no header");
    assert!(problem.contains(expected), "{expected:?} is not in: {problem}");
}

/// A file with every type of value, and a tensor of each kind of type.
fn valid() -> Vec<u8> {
    let metadata = [
        ("a", Value::U8(200)),
        ("b", Value::I8(-2)),
        ("c", Value::U16(40000)),
        ("d", Value::I16(-3)),
        ("e", Value::U32(1 << 31)),
        ("f", Value::I32(-4)),
        ("g", Value::U64(1 << 63)),
        ("h", Value::I64(-5)),
        ("i", Value::F32(1.5)),
        ("j", Value::F64(2.5)),
        ("k", Value::Bool(true)),
        ("l", Value::String("text".into())),
        ("m", Value::Array(vec![Value::String("x".into()), Value::String(String::new())])),
    ];
    file(&metadata, &[("norm", &[4], 0, 0), ("matrix", &[32, 2], 8, 32)], 32 + 68)
}

#[test]
fn all_types_of_values_are_read() {
    let header = read(&valid()).unwrap();
    let numbers = ["a", "b", "c", "d", "e", "f", "g", "h"].map(|key| integer(&header.metadata[key]).unwrap());
    assert_eq!(numbers, [200, -2, 40000, -3, 1 << 31, -4, 1 << 63, -5]);
    assert_eq!(integer(&header.metadata["i"]), None);
    assert_eq!(header.metadata["m"].to_vec().unwrap().len(), 2);
    let tensors = header.tensors.iter().map(|tensor| (&*tensor.name, tensor.dtype, &*tensor.shape));
    let expected: [(&str, GgmlDType, &[usize]); 2] =
        [("norm", GgmlDType::F32, &[4]), ("matrix", GgmlDType::Q8_0, &[2, 32])];
    assert_eq!(tensors.collect::<Vec<_>>(), expected);
}

#[test]
fn broken_files_are_refused_with_what_is_wrong() {
    refused(b"", "the magic number: 4 bytes are needed, and 0 are left");
    refused(b"GGML\x03\0\0\0", "it does not start with GGUF");
    refused(b"GGUF\0\0\0\x03", "big-endian");
    refused(b"GGUF\x01\0\0\0", "its version is 1; expected one of [2, 3]");
    for (alignment, shown) in [(Value::U32(0), "0"), (Value::U32(48), "48"), (Value::String("x".into()), "x")]
    {
        let bytes = file(&[("general.alignment", alignment)], &[], 0);
        let problem = read(&bytes).expect_err("no header");
        assert!(problem.contains("general.alignment is") && problem.contains(shown), "{problem}");
    }
    // An alignment of any width of integer counts.
    let bytes = file(&[("general.alignment", Value::U64(64))], &[("t", &[1], 0, 32)], 256);
    refused(&bytes, "tensor t: its offset is 32; expected a multiple of 64");
    let twice = [("key", Value::U8(1)), ("key", Value::U8(2))];
    refused(&file(&twice, &[], 0), "it has the key key twice");
    let tensor = |shape, kind| file(&[], &[("t", shape, kind, 0)], 64);
    refused(&file(&[], &[("t", &[1], 0, 0), ("t", &[1], 0, 0)], 64), "it has the tensor t twice");
    refused(&tensor(&[1, 1, 1, 1, 1], 0), "tensor t: it has 5 dimensions; expected at most 4");
    refused(&tensor(&[4, 0], 0), "tensor t: a dimension is 0");
    refused(&tensor(&[40], 8), "tensor t: its rows have 40 elements; Q8_0 has blocks of 32");
    refused(&tensor(&[32], 23), "tensor t: its type is 23 (IQ4_XS)");
    refused(&tensor(&[32], 77), "tensor t: its type is 77 (unknown)");
    refused(&tensor(&[1 << 40, 1 << 40], 0), "which is larger than any memory");
    refused(&tensor(&[1 << 61, 4], 0), "which is larger than any memory");
    refused(&tensor(&[17], 0), "tensor t: it needs 68 bytes from 64 on; the file has 128 bytes");
    let far = file(&[], &[("t", &[1], 0, u64::MAX - 31)], 64);
    refused(&far, "tensor t: it needs 4 bytes from");
}

/// Counts and lengths that a file does not have bytes for allocate nothing.
#[test]
fn huge_counts_are_refused() {
    let with = |at: usize, number: u64| {
        let mut bytes = head(&[("key", Value::String("text".into()))], &[("t", &[1], 0, 0)]);
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    // Tensors, keys, the length of a key, that of its value.
    for (at, expected) in [(8, "tensor 1 of"), (16, "are needed"), (24, "key 0 of 1"), (39, "key")] {
        for number in [u64::MAX, 1 << 62, 1 << 40] {
            refused(&with(at, number), expected);
        }
    }
    let array = |kind: u32, len: u64| {
        let mut bytes = head(&[], &[]);
        bytes[16] = 1;
        string(&mut bytes, "key");
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes
    };
    refused(&array(8, u64::MAX), "key: 18446744073709551615 bytes are needed, and 0 are left");
    refused(&array(9, 1), "key is an array of type 9");
    refused(&array(13, 1), "key is an array of type 13");
}

#[test]
fn every_beginning_of_a_file_is_refused() {
    let whole = valid();
    assert!(read(&whole).is_ok());
    for len in 0..whole.len() {
        assert!(read(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes);
        let _ = read(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
    }

    #[test]
    fn no_change_of_a_file_makes_the_reader_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let mut bytes = valid();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        // All that a header says lies within the file.
        for tensor in read(&bytes).map(|header| header.tensors).unwrap_or_default() {
            let elements = tensor.shape.iter().product::<usize>();
            let size = elements / tensor.dtype.block_size() * tensor.dtype.type_size();
            prop_assert!(tensor.start + size as u64 <= bytes.len() as u64);
        }
    }
}

/// Writes a part, `numbers` of `split.no`, `split.count` and `split.tensors.count`.
fn part(folder: &TempDir, name: &str, numbers: [u16; 3], tensor: &str) {
    let keys = ["split.no", "split.count", "split.tensors.count"];
    let metadata: Vec<_> = keys.into_iter().zip(numbers.map(Value::U16)).collect();
    fs::write(folder.path().join(name), file(&metadata, &[(tensor, &[2], 0, 0)], 8)).unwrap();
}

#[test]
fn parts_of_a_model_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let [first, second] = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    let problem = |result: crate::Result<Gguf>| result.expect_err("no model").to_string();

    part(&folder, first, [0, 2, 2], "a");
    let error = problem(Gguf::open(&path(first)));
    assert!(error.contains("cannot open the model") && error.contains(second), "{error}");
    part(&folder, second, [1, 2, 2], "b");
    for name in [first, second] {
        let model = Gguf::open(&path(name)).unwrap();
        assert_eq!(model.path(), path(first));
        assert_eq!(model.tensors.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(model.vector("b", 2).unwrap(), model.vector("a", 2).unwrap());
    }
    let parts = |names: &[&str]| {
        let paths: Vec<_> = names.iter().map(|name| path(name)).collect();
        Gguf::open_parts(&paths.iter().map(|path| &**path).collect::<Vec<&Path>>())
    };
    assert!(parts(&[first, second]).is_ok());
    assert!(problem(parts(&[second, first])).contains("split.no is 1; expected 0"));
    assert!(problem(parts(&[first])).contains("it is one of 2 parts; expected one of 1"));
    assert!(problem(parts(&[])).contains("at least one file"));

    part(&folder, second, [1, 2, 2], "a");
    assert!(problem(Gguf::open(&path(first))).contains("it has the tensor a twice"));
    part(&folder, second, [1, 2, 3], "b");
    part(&folder, first, [0, 2, 3], "a");
    assert!(problem(Gguf::open(&path(first))).contains("its parts have 2 tensors; expected 3"));
    part(&folder, "other.gguf", [0, 2, 2], "a");
    assert!(problem(Gguf::open(&path("other.gguf"))).contains("-00001-of-00002.gguf"));
    part(&folder, "many.gguf", [0, 60000, 2], "a");
    assert!(problem(Gguf::open(&path("many.gguf"))).contains("split.count is"));
    assert!(problem(Gguf::open(folder.path())).contains("it is no file"));
}
