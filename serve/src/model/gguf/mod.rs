//! GGUF files: metadata, and where each tensor lies. Nothing of a file is
//! trusted: counts, lengths and offsets are compared with the file's size
//! before anything is allocated or read by them.

mod reader;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    fs::{self, File},
    io::BufReader,
    iter,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use candle_core::quantized::{GgmlDType, gguf_file::Value};

use self::reader::{Header, TensorHeader};
use super::matrix::Matrix;
use crate::Result;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: GgmlDType,
    /// Outermost dimension first, as of an array in C.
    pub shape: Vec<usize>,
    /// Which of the files it is in.
    file: usize,
    /// Where its bytes start in the file.
    start: u64,
}

/// An open model, in one file or in several parts.
#[derive(Debug)]
pub struct Gguf {
    pub metadata: HashMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
    files: Vec<(PathBuf, File)>,
    bytes_read: AtomicU64,
}

impl TensorInfo {
    /// How many matrices it has, and their rows and columns.
    fn matrices(&self, name: &str) -> Result<[usize; 3]> {
        match *self.shape {
            [columns] => Ok([1, 1, columns]),
            [rows, columns] => Ok([1, rows, columns]),
            [count, rows, columns] => Ok([count, rows, columns]),
            _ => {
                let problem = format!("its shape is {:?}; expected up to 3 dimensions", self.shape);
                Err(format!("tensor {name}: {problem}").into())
            }
        }
    }
}

impl Gguf {
    /// Opens a file, and the other parts of the model if it is one of several,
    /// which are called `…-00001-of-00002.gguf` and lie beside it.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, header) = open(path)?;
        let count = header.split_count().map_err(|e| unusable(path, e))?;
        if count <= 1 {
            return Self::join(vec![(path.into(), file, header)]);
        }
        let parts = part_paths(path, count).ok_or_else(|| {
            let expected = format!("a name that ends in -00001-of-{count:05}.gguf");
            unusable(path, format!("it is one of {count} parts; expected {expected}"))
        })?;
        drop(file);
        let parts: Vec<_> = parts.iter().map(PathBuf::as_path).collect();
        Self::open_parts(&parts)
    }

    /// Opens the files of a model: one, as [`open`](Self::open) does, or all parts in order,
    /// whatever their names are.
    pub fn open_files(files: &[PathBuf]) -> Result<Self> {
        match files {
            [file] => Self::open(file),
            parts => Self::open_parts(&parts.iter().map(PathBuf::as_path).collect::<Vec<_>>()),
        }
    }

    /// Opens the parts of a model, in order, whatever their names are.
    pub fn open_parts(paths: &[&Path]) -> Result<Self> {
        let open = |path: &&Path| open(path).map(|(file, header)| (PathBuf::from(path), file, header));
        Self::join(paths.iter().map(open).collect::<Result<_>>()?)
    }

    /// Makes one model of its parts: metadata of the first, and tensors of all.
    fn join(parts: Vec<(PathBuf, File, Header)>) -> Result<Self> {
        let (mut tensors, mut files, mut metadata) = (BTreeMap::new(), Vec::new(), None);
        let (mut expected, count) = (None, parts.len());
        for (index, (path, file, header)) in parts.into_iter().enumerate() {
            let broken = |problem: String| unusable(&path, problem);
            let split = header.split_count().map_err(broken)?.max(1);
            if split != count {
                return Err(broken(format!("it is one of {split} parts; expected one of {count}")));
            }
            match header.metadata.get("split.no").map(integer) {
                None if count == 1 => {}
                Some(Some(number)) if number == index as i128 => {}
                number => {
                    let number = number.flatten().map_or("missing, or no number".into(), |n| n.to_string());
                    return Err(broken(format!("split.no is {number}; expected {index}")));
                }
            }
            expected = expected.or(header.metadata.get("split.tensors.count").and_then(integer));
            for TensorHeader { name, dtype, shape, start } in header.tensors {
                if tensors.contains_key(&name) {
                    return Err(broken(format!("it has the tensor {name} twice")));
                }
                tensors.insert(name, TensorInfo { dtype, shape, file: index, start });
            }
            metadata = metadata.or(Some(header.metadata));
            files.push((path, file));
        }
        let (Some(metadata), Some((path, _))) = (metadata, files.first()) else {
            return Err("a model has at least one file".into());
        };
        if let Some(expected) = expected.filter(|&expected| expected != tensors.len() as i128) {
            let problem = format!("its parts have {} tensors; expected {expected}", tensors.len());
            return Err(unusable(path, problem));
        }
        Ok(Self { metadata, tensors, files, bytes_read: AtomicU64::new(0) })
    }

    /// The first file.
    pub fn path(&self) -> &Path {
        &self.files[0].0
    }

    /// Bytes of tensors that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// A tensor that must be there and have this shape.
    pub fn find(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let problem = match self.tensors.get(name) {
            Some(info) if info.shape == shape => return Ok(info),
            Some(info) => format!("its shape is {:?}; expected {shape:?}", info.shape),
            None => "it is missing".into(),
        };
        Err(format!("tensor {name}: {problem}").into())
    }

    /// Reads a tensor of one dimension.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let vector = self.read(name, self.find(name, &[len])?, &Part::All)?.swap_remove(0);
        Ok(vector.dequantize()?.flatten_all()?.to_vec1()?)
    }

    /// Reads a part of the matrices of a tensor: one, or several if it has three
    /// dimensions. Nothing else of it is read, but for the rest of a quantized block.
    pub fn read(&self, name: &str, info: &TensorInfo, part: &Part) -> Result<Vec<Matrix>> {
        let [count, rows, columns] = info.matrices(name)?;
        let (path, file) = &self.files[info.file];
        let row_bytes = bytes(info.dtype, columns);
        let read = |start: usize, buffer: &mut [u8]| -> Result<()> {
            file.read_exact_at(buffer, info.start + start as u64)
                .map_err(|e| format!("cannot read tensor {name} of {}: {e}", path.display()))?;
            self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            Ok(())
        };
        let matrix = |index: usize| {
            let first = index * rows * row_bytes;
            let ranges = match part {
                Part::All => iter::once(0..rows).collect::<Vec<_>>(),
                Part::Rows(ranges) => ranges.clone(),
                Part::Columns(range) => {
                    return columns_of(info.dtype, rows, range, |row, at, buffer| {
                        read(first + row * row_bytes + at, buffer)
                    });
                }
            };
            let height = ranges.iter().map(ExactSizeIterator::len).sum();
            let mut buffer = vec![0; height * row_bytes];
            let mut left = &mut buffer[..];
            for range in ranges {
                let (here, behind) = left.split_at_mut(range.len() * row_bytes);
                read(first + range.start * row_bytes, here)?;
                left = behind;
            }
            Matrix::from_bytes(buffer, info.dtype, [height, columns])
        };
        (0..count).map(matrix).collect()
    }
}

/// A part of a matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    All,
    /// Rows, range after range.
    Rows(Vec<Range<usize>>),
    Columns(Range<usize>),
}

impl Part {
    /// The bytes of it in matrices of a tensor.
    pub fn bytes(&self, name: &str, info: &TensorInfo) -> Result<u64> {
        let [count, rows, columns] = info.matrices(name)?;
        let [rows, columns] = match self {
            Self::All => [rows, columns],
            Self::Rows(ranges) => [ranges.iter().map(ExactSizeIterator::len).sum(), columns],
            Self::Columns(range) => [rows, blocks(info.dtype, range).len()],
        };
        Ok((count * rows * bytes(info.dtype, columns)) as u64)
    }
}

/// Columns in whole blocks that hold these.
fn blocks(dtype: GgmlDType, columns: &Range<usize>) -> Range<usize> {
    let block = dtype.block_size();
    columns.start / block * block..columns.end.next_multiple_of(block)
}

/// Columns of a matrix, as they are in the file; in `f32` if they begin or end within a block.
/// `read` reads bytes of a row, from one on.
fn columns_of(
    dtype: GgmlDType,
    rows: usize,
    range: &Range<usize>,
    read: impl Fn(usize, usize, &mut [u8]) -> Result<()>,
) -> Result<Matrix> {
    let whole = blocks(dtype, range);
    let width = bytes(dtype, whole.len());
    let mut buffer = vec![0; rows * width];
    let start = bytes(dtype, whole.start);
    for (row, of_row) in buffer.chunks_exact_mut(width).enumerate() {
        read(row, start, of_row)?;
    }
    let matrix = Matrix::from_bytes(buffer, dtype, [rows, whole.len()])?;
    match whole == *range {
        true => Ok(matrix),
        false => {
            let numbers = matrix.dequantize()?.narrow(1, range.start - whole.start, range.len())?;
            Matrix::new(&numbers.contiguous()?, GgmlDType::F32)
        }
    }
}

/// Bytes of so many numbers, in whole blocks.
fn bytes(dtype: GgmlDType, numbers: usize) -> usize {
    numbers / dtype.block_size() * dtype.type_size()
}

/// An integer of any width.
pub fn integer(value: &Value) -> Option<i128> {
    Some(match *value {
        Value::U8(value) => value.into(),
        Value::I8(value) => value.into(),
        Value::U16(value) => value.into(),
        Value::I16(value) => value.into(),
        Value::U32(value) => value.into(),
        Value::I32(value) => value.into(),
        Value::U64(value) => value.into(),
        Value::I64(value) => value.into(),
        _ => return None,
    })
}

fn open(path: &Path) -> Result<(File, Header)> {
    let cannot = |e: &dyn Display| format!("cannot open the model {}: {e}", path.display());
    let metadata = fs::metadata(path).map_err(|e| cannot(&e))?;
    // Before it is opened, which waits if it is a pipe.
    if !metadata.is_file() {
        return Err(cannot(&"it is no file").into());
    }
    let file = File::open(path).map_err(|e| cannot(&e))?;
    let header = Header::read(BufReader::new(&file), metadata.len()).map_err(|e| unusable(path, e))?;
    Ok((file, header))
}

fn unusable(path: &Path, problem: String) -> crate::Error {
    format!("{} is not a usable GGUF file: {problem}", path.display()).into()
}

/// The paths of all parts, from that of one.
fn part_paths(path: &Path, count: usize) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (name, number) = name.rsplit_once('-')?;
    let is_number = number.len() == 5 && number.bytes().all(|byte| byte.is_ascii_digit());
    let part = |part| path.with_file_name(format!("{name}-{part:05}-of-{count:05}.gguf"));
    is_number.then(|| (1..=count).map(part).collect())
}
