//! Owned references to TVM-FFI objects, and owned results.

use std::{
    ffi::{c_int, c_void},
    fmt,
    mem::ManuallyDrop,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering, fence},
};

use super::{
    abi::{Any, ByteArray, DlDataType, DlDevice, ErrorCell, ObjectHeader, RawDlTensor, SeqCell, type_index},
    args::Arg,
    library::TvmFfi,
};
use crate::{
    device::Device,
    dtype::DType,
    error::{FlashInferError, Result},
    tensor::{MAX_RANK, TensorRef},
};

/// One strong reference to an object of TVM-FFI. Cloning takes another
/// reference; dropping gives this one back.
///
/// The library counts references in 32 bits and lets them wrap. As with Rust's
/// `Arc`, references that are leaked end the process before that: each one that
/// comes to Rust, cloned or from a call, finds fewer than 2³¹ others.
pub struct Object(NonNull<ObjectHeader>);

// SAFETY: the reference count is atomic, and this crate reads nothing of an
// object but strings, errors, arrays, and lists, which only functions change,
// whose calls are unsafe; closures are given none. What objects of others do when
// they are dropped, their library allows in any thread; those of the crate `tvm-ffi`
// come by an unsafe function that says so.
unsafe impl Send for Object {}
// SAFETY: as for `Send`.
unsafe impl Sync for Object {}

impl Object {
    /// Takes over one strong reference.
    ///
    /// # Safety
    /// The pointer must be a live object of the process's libtvm_ffi, and the
    /// caller gives up one reference to it.
    pub(crate) unsafe fn from_owned(object: NonNull<ObjectHeader>) -> Self {
        let object = Self(object);
        end_before_wrap(object.strong_count());
        object
    }

    /// Takes another reference to somebody's object.
    ///
    /// # Safety
    /// The pointer must be a live object of the process's libtvm_ffi.
    pub(super) unsafe fn share(object: NonNull<ObjectHeader>) -> Self {
        (*ManuallyDrop::new(Self(object))).clone()
    }

    /// The object's type; see [`type_index`].
    pub fn type_index(&self) -> i32 {
        // SAFETY: the object is alive and starts with its header. Only this field
        // is read, because the count beside it may be changing.
        unsafe { (*self.0.as_ptr()).type_index }
    }

    /// The address of the object.
    pub fn as_ptr(&self) -> *mut ObjectHeader {
        self.0.as_ptr()
    }

    /// How many strong references there are right now, this one included.
    pub fn strong_count(&self) -> u32 {
        self.count().load(Ordering::Relaxed) as u32
    }

    /// Strong and weak count, as the atomic that the library uses.
    fn count(&self) -> &AtomicU64 {
        // SAFETY: the object is alive, and only ever counts atomically.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.0.as_ptr()).combined_ref_count) }
    }

    /// A new array. It takes its own references to objects among the items.
    ///
    /// # Safety
    /// Of each item, what it points to must outlive the array and whoever
    /// takes a reference to it; objects do.
    pub(crate) unsafe fn array<'a>(items: impl IntoIterator<Item = Arg<'a>>) -> Self {
        let items: Box<[Any]> = items.into_iter().map(|item| *item.as_any()).collect();
        for item in items.iter().filter(|item| item.type_index >= type_index::OBJECT_BEGIN) {
            // SAFETY: an argument of such an index borrows a live object.
            if let Some(object) = NonNull::new(unsafe { item.payload.object }) {
                // The array's reference, which `delete_array` gives back.
                // SAFETY: the object is alive.
                std::mem::forget(unsafe { Self::share(object) });
            }
        }
        let size = items.len() as i64;
        let data = Box::into_raw(items).cast();
        let cell = SeqCell { data, size, capacity: size, data_deleter: None };
        Self::make(type_index::ARRAY, cell, delete_array)
    }

    /// A new string.
    pub(crate) fn text(text: &str) -> Self {
        // Readers in C expect a NUL behind the bytes.
        let bytes: Box<[u8]> = text.bytes().chain([0]).collect();
        let cell = ByteArray { data: Box::into_raw(bytes).cast_const().cast(), size: text.len() };
        Self::make(type_index::STR, cell, delete_text)
    }

    fn make<C>(type_index: i32, cell: C, deleter: Deleter) -> Self {
        let header =
            ObjectHeader { combined_ref_count: BOTH_ONE, type_index, padding: 0, deleter: Some(deleter) };
        Self(NonNull::from(Box::leak(Box::new(Made { header, cell }))).cast())
    }

    /// A view of the tensor, when this is one.
    ///
    /// # Errors
    /// [`FlashInferError::ResultType`]: this is no tensor, or one that a view
    /// cannot show: of more than 5 dimensions, of an element type that
    /// [`DType`] does not have, with negative strides, or on a device that is
    /// neither the host nor a CUDA device.
    ///
    /// # Safety
    /// As for [`TensorRef::from_raw_parts`]: as long as the view lives, nobody
    /// writes to the tensor, and work that uses the view comes after the work
    /// that wrote it.
    pub unsafe fn tensor(&self) -> Result<TensorRef<'_>> {
        let any = *Arg::from(self).as_any();
        // SAFETY: the object is alive, and as long as `self` is; the caller promises the rest.
        unsafe { tensor_of(&any) }.unwrap_or_else(|| Err(no_tensor(format!("{self:?}"))))
    }

    /// The payload that follows the header.
    fn cell<T>(&self) -> *const T {
        // SAFETY: the header is followed by the cell within one allocation.
        unsafe { self.0.as_ptr().add(1).cast::<T>().cast_const() }
    }

    /// The elements, when this is an Array or a List of integers.
    pub fn to_ints(&self) -> Option<Vec<i64>> {
        self.ints()
    }

    /// The same, in a collection of any kind.
    pub(crate) fn ints<C: FromIterator<i64>>(&self) -> Option<C> {
        let items = self.items()?;
        let all = items.iter().all(|item| item.type_index == type_index::INT);
        // SAFETY: all 8 bytes of a payload are initialized.
        all.then(|| items.iter().map(|item| unsafe { item.payload.int64 }).collect())
    }

    /// Object and integer, when this is an Array or a List of these two: TVM-FFI's
    /// tuples are arrays.
    pub(crate) fn to_object_and_int(&self) -> Option<(Self, i64)> {
        let [object, int] = self.items()? else { return None };
        if object.type_index < type_index::OBJECT_BEGIN || int.type_index != type_index::INT {
            return None;
        }
        // SAFETY: the payload is what the tag says; the array keeps its own
        // reference to the object, and the clone is another.
        unsafe { Some((Self::share(NonNull::new(object.payload.object)?), int.payload.int64)) }
    }

    /// The elements, when this is an Array or a List.
    fn items(&self) -> Option<&[Any]> {
        if !matches!(self.type_index(), type_index::ARRAY | type_index::LIST) {
            return None;
        }
        // SAFETY: an Array or List object's header is followed by a SeqCell,
        // whose `data` holds `size` values.
        Some(unsafe {
            let cell = &*self.cell::<SeqCell>();
            match usize::try_from(cell.size) {
                Ok(size) if size > 0 => std::slice::from_raw_parts(cell.data, size),
                _ => &[],
            }
        })
    }

    /// The text, when this is a string object.
    pub fn to_text(&self) -> Option<String> {
        if self.type_index() != type_index::STR {
            return None;
        }
        // SAFETY: a Str object's header is followed by its bytes' address and size.
        Some(unsafe { copy_text(&*self.cell::<ByteArray>()) })
    }

    /// Kind, message and backtrace, when this is an error.
    pub(crate) fn to_error(&self) -> Option<(String, String, String)> {
        if self.type_index() != type_index::ERROR {
            return None;
        }
        // SAFETY: an Error object's header is followed by an ErrorCell.
        let cell = unsafe { &*self.cell::<ErrorCell>() };
        // SAFETY: its byte arrays are alive as long as the error is.
        unsafe { Some((copy_text(&cell.kind), copy_text(&cell.message), copy_text(&cell.backtrace))) }
    }
}

/// Ends the process when there are so many references that they must have been
/// leaked: a count that wraps would free what is in use.
fn end_before_wrap(strong_count: u32) {
    if strong_count > u32::MAX / 2 {
        std::process::abort();
    }
}

/// A view of a tensor, which is given by its address or as an object; `None` if this is none.
///
/// # Safety
/// The payload is what the tag says, and lives for `'a`; the rest as of [`Object::tensor`].
pub(super) unsafe fn tensor_of<'a>(any: &Any) -> Option<Result<TensorRef<'a>>> {
    // SAFETY: promised by the caller. A Tensor object's header is followed by its DLTensor.
    unsafe {
        let raw: *const RawDlTensor = match any.type_index {
            type_index::DL_TENSOR_PTR => any.payload.ptr.cast(),
            type_index::TENSOR => any.payload.object.add(1).cast_const().cast(),
            _ => return None,
        };
        raw.as_ref().map(|raw| view_of(raw))
    }
}

/// # Safety
/// As of [`tensor_of`].
unsafe fn view_of<'a>(raw: &RawDlTensor) -> Result<TensorRef<'a>> {
    let rank = raw.ndim.max(0) as usize;
    let numbers = |numbers: *const i64| -> Option<Vec<usize>> {
        // SAFETY: shape and strides hold `ndim` numbers.
        let numbers = if rank == 0 { &[] } else { unsafe { std::slice::from_raw_parts(numbers, rank) } };
        numbers.iter().map(|&number| usize::try_from(number).ok()).collect()
    };
    let strides = if raw.strides.is_null() { Some(None) } else { numbers(raw.strides).map(Some) };
    let (dtype, device) = (DType::from_dlpack(raw.dtype), Device::from_dlpack(raw.device));
    let (Some(dtype), Some(device), Some(shape), Some(strides)) =
        (dtype, device, numbers(raw.shape), strides)
    else {
        return Err(no_tensor(format!("a tensor of {:?} on {:?}", raw.dtype, raw.device)));
    };
    if rank > MAX_RANK {
        return Err(no_tensor(format!("a tensor of {rank} dimensions; a view has at most {MAX_RANK}")));
    }
    let data = raw.data.wrapping_byte_add(raw.byte_offset as usize);
    // SAFETY: promised by the caller.
    unsafe { TensorRef::from_raw_parts(data, device, dtype, &shape, strides.as_deref()) }
}

pub(super) fn no_tensor(found: String) -> FlashInferError {
    FlashInferError::ResultType { expected: "a tensor", found }
}

/// # Safety
/// The byte array's address and size must describe readable memory.
unsafe fn copy_text(bytes: &ByteArray) -> String {
    if bytes.data.is_null() || bytes.size == 0 {
        return String::new();
    }
    // SAFETY: promised by the caller.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.data.cast::<u8>(), bytes.size) };
    String::from_utf8_lossy(bytes).into_owned()
}

impl Clone for Object {
    fn clone(&self) -> Self {
        end_before_wrap(self.count().fetch_add(1, Ordering::Relaxed) as u32);
        Self(self.0)
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        match TvmFfi::get() {
            // SAFETY: this value owns one reference and gives it back once.
            Some(library) => drop(unsafe { (library.object_dec_ref)(self.0.as_ptr()) }),
            // Without the library, objects are this crate's own, and nobody
            // has weak references: what comes from others has it used first.
            None if self.count().fetch_sub(1, Ordering::Release) == BOTH_ONE => {
                fence(Ordering::Acquire);
                // SAFETY: the last reference is gone; the flags say so.
                unsafe {
                    if let Some(delete) = (*self.0.as_ptr()).deleter {
                        delete(self.0.as_ptr().cast(), STRONG | WEAK);
                    }
                }
            }
            None => {}
        }
    }
}

type Deleter = unsafe extern "C" fn(*mut c_void, c_int);

/// One strong and one weak reference.
pub(super) const BOTH_ONE: u64 = 1 << 32 | 1;
/// What a deleter is asked to do: release what the object holds, and free it.
const STRONG: c_int = 1;
const WEAK: c_int = 2;

/// An object that this crate makes. Its cell owns what it points to.
#[repr(C)]
struct Made<C> {
    header: ObjectHeader,
    cell: C,
}

/// # Safety
/// The object is a `Made` array without references.
unsafe extern "C" fn delete_array(object: *mut c_void, flags: c_int) {
    let made = object.cast::<Made<SeqCell>>();
    // SAFETY: promised by the caller. The library may have changed items and
    // size meanwhile, but not address and capacity, and owns the items as an
    // array does. Each bit of the flags comes once.
    unsafe {
        let cell = &mut (*made).cell;
        if flags & STRONG != 0 {
            for item in 0..cell.size.max(0) as usize {
                drop(Value::from_owned(*cell.data.add(item)));
            }
            cell.size = 0;
        }
        if flags & WEAK != 0 {
            drop(Box::from_raw(ptr::slice_from_raw_parts_mut(cell.data, cell.capacity as usize)));
            drop(Box::from_raw(made));
        }
    }
}

/// # Safety
/// The object is a `Made` string without references.
unsafe extern "C" fn delete_text(object: *mut c_void, flags: c_int) {
    if flags & WEAK != 0 {
        // SAFETY: promised by the caller; the bit comes once. The text is
        // followed by a NUL.
        unsafe {
            let made = Box::from_raw(object.cast::<Made<ByteArray>>());
            let text = made.cell.data.cast_mut().cast::<u8>();
            drop(Box::from_raw(ptr::slice_from_raw_parts_mut(text, made.cell.size + 1)));
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object(type {})", self.type_index())
    }
}

/// What a function returned.
///
/// It converts into the type that is expected, or into an error that names
/// what came instead ([`FlashInferError::ResultType`]):
///
/// | into | from |
/// |---|---|
/// | `()` | None |
/// | `i64`, `bool` | an integer, a boolean |
/// | `f64` | a float or an integer |
/// | `String` | a string, short or long |
/// | `Vec<i64>` | an array of integers |
/// | [`Object`] | any object; [`Object::tensor`] shows a tensor |
///
/// ```
/// use flashinfer_rs::ffi::Value;
/// assert_eq!(i64::try_from(Value::Int(3))?, 3);
/// let error = bool::try_from(Value::Int(3)).unwrap_err();
/// assert_eq!(error.to_string(), "the function returned Int(3), not a boolean");
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Value {
    /// Nothing.
    None,
    /// An integer.
    Int(i64),
    /// A boolean.
    Bool(bool),
    /// A float.
    Float(f64),
    /// An element type.
    DType(DlDataType),
    /// A device.
    Device(DlDevice),
    /// A string of at most 7 bytes; longer ones come as objects. `String::try_from`
    /// takes both.
    Text(String),
    /// An object: array, tensor, long string, function, …
    Object(Object),
    /// A kind that this crate does not read, by its type index.
    Other(i32),
}

impl Value {
    /// Takes over a result.
    ///
    /// # Safety
    /// `any` must be an owned value that nothing else will release.
    pub(crate) unsafe fn from_owned(any: Any) -> Self {
        // SAFETY: in each arm, the payload is what the tag says.
        unsafe {
            match any.type_index {
                type_index::NONE => Self::None,
                type_index::INT => Self::Int(any.payload.int64),
                type_index::BOOL => Self::Bool(any.payload.int64 != 0),
                type_index::FLOAT => Self::Float(any.payload.float64),
                type_index::DATA_TYPE => Self::DType(any.payload.dtype),
                type_index::DEVICE => Self::Device(any.payload.device),
                type_index::SMALL_STR | type_index::SMALL_BYTES => {
                    let len = (any.small_len as usize).min(7);
                    Self::Text(String::from_utf8_lossy(&any.payload.bytes[..len]).into_owned())
                }
                index if index >= type_index::OBJECT_BEGIN => match NonNull::new(any.payload.object) {
                    Some(object) => Self::Object(Object::from_owned(object)),
                    None => Self::None,
                },
                other => Self::Other(other),
            }
        }
    }
}

macro_rules! conversions {
    ($($to:ty, $expected:literal, $($from:pat => $value:expr),+;)*) => {$(
        impl TryFrom<Value> for $to {
            type Error = FlashInferError;

            fn try_from(value: Value) -> Result<Self> {
                let converted = match &value {
                    $($from => $value,)+
                    _ => None,
                };
                converted.ok_or_else(|| FlashInferError::ResultType {
                    expected: $expected,
                    found: format!("{value:?}"),
                })
            }
        }
    )*};
}
conversions! {
    (), "None", Value::None => Some(());
    i64, "an integer", Value::Int(number) => Some(*number);
    bool, "a boolean", Value::Bool(flag) => Some(*flag);
    f64, "a float", Value::Float(number) => Some(*number), Value::Int(number) => Some(*number as f64);
    String, "a string", Value::Text(text) => Some(text.clone()), Value::Object(object) => object.to_text();
    Vec<i64>, "an array of integers", Value::Object(object) => object.to_ints();
    Object, "an object", Value::Object(object) => Some(object.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether or not libtvm_ffi is in the process.
    #[test]
    fn made_objects_own_what_they_hold() {
        let text = Object::text("nothing\0hidden");
        assert_eq!((text.type_index(), text.strong_count()), (type_index::STR, 1));
        assert_eq!(text.to_text().unwrap(), "nothing\0hidden");
        let items = [Arg::from(&text), 3i64.into(), Arg::from(&text), Arg::NONE];
        // SAFETY: numbers and objects only.
        let array = unsafe { Object::array(items) };
        assert_eq!((array.to_ints(), text.strong_count()), (None, 3));
        // SAFETY: as above.
        let outer = unsafe { Object::array([Arg::from(&array)]) };
        let again = outer.clone();
        assert_eq!((outer.strong_count(), array.strong_count()), (2, 2));
        drop((array, outer));
        assert_eq!(text.strong_count(), 3);
        drop(again);
        assert_eq!(text.strong_count(), 1);
        // SAFETY: numbers only.
        let numbers = unsafe { Object::array([1i64, -2].map(Arg::from)) };
        assert_eq!(numbers.to_ints().unwrap(), [1, -2]);
        // SAFETY: numbers and objects only.
        let tuple = unsafe { Object::array([Arg::from(&numbers), 48i64.into()]) };
        let (first, second) = tuple.to_object_and_int().unwrap();
        assert_eq!((first.to_ints().unwrap(), second, tuple.to_ints()), (vec![1, -2], 48, None));
        assert!(numbers.to_object_and_int().is_none() && text.to_object_and_int().is_none());
        drop(tuple);
        assert_eq!((first.strong_count(), numbers.strong_count()), (2, 2));
        // SAFETY: as above.
        assert_eq!(unsafe { Object::array([]) }.to_ints().unwrap(), Vec::<i64>::new());
    }
}
