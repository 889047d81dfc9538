//! Owned references to TVM-FFI objects, and owned results.

use std::{fmt, ptr::NonNull};

use super::{
    abi::{Any, ByteArray, DlDataType, DlDevice, ErrorCell, ObjectHeader, SeqCell, type_index},
    library::TvmFfi,
};

/// One strong reference to an object of TVM-FFI. Cloning takes another
/// reference; dropping gives this one back.
pub struct Object(NonNull<ObjectHeader>);

// SAFETY: the reference count is atomic, and this crate reads nothing of an
// object but immutable arrays, strings and errors.
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
        Self(object)
    }

    /// The object's type; see [`type_index`].
    pub fn type_index(&self) -> i32 {
        // SAFETY: the object is alive and starts with its header.
        unsafe { self.0.as_ref() }.type_index
    }

    /// The address of the object.
    pub fn as_ptr(&self) -> *mut ObjectHeader {
        self.0.as_ptr()
    }

    /// How many strong references there are right now, this one included.
    pub fn strong_count(&self) -> u32 {
        // SAFETY: the object is alive; the count is read as the atomic that the
        // library uses.
        let count =
            unsafe { std::sync::atomic::AtomicU64::from_ptr(&raw mut (*self.0.as_ptr()).combined_ref_count) };
        count.load(std::sync::atomic::Ordering::Relaxed) as u32
    }

    /// The payload that follows the header.
    fn cell<T>(&self) -> *const T {
        // SAFETY: the header is followed by the cell within one allocation.
        unsafe { self.0.as_ptr().add(1).cast::<T>().cast_const() }
    }

    /// The elements, when this is an Array or a List of integers.
    pub fn to_ints(&self) -> Option<Vec<i64>> {
        if !matches!(self.type_index(), type_index::ARRAY | type_index::LIST) {
            return None;
        }
        // SAFETY: an Array or List object's header is followed by a SeqCell,
        // whose `data` holds `size` values.
        let items = unsafe {
            let cell = &*self.cell::<SeqCell>();
            match usize::try_from(cell.size) {
                Ok(size) if size > 0 => std::slice::from_raw_parts(cell.data, size),
                _ => &[],
            }
        };
        items
            .iter()
            // SAFETY: all 8 bytes of a payload are initialized.
            .map(|item| (item.type_index == type_index::INT).then_some(unsafe { item.payload.int64 }))
            .collect()
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
        if let Some(library) = TvmFfi::get() {
            // SAFETY: the object is alive.
            unsafe { (library.object_inc_ref)(self.0.as_ptr()) };
        }
        Self(self.0)
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // Objects only come from the library, so it is there.
        if let Some(library) = TvmFfi::get() {
            // SAFETY: this value owns one reference and gives it back once.
            unsafe { (library.object_dec_ref)(self.0.as_ptr()) };
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Object(type {})", self.type_index())
    }
}

/// What a function returned.
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
    /// A string of at most 7 bytes; longer ones come as objects.
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
