//! The C types of TVM-FFI 0.1 and DLPack 1, with their sizes and offsets
//! checked at compile time.

use std::ffi::{c_char, c_int, c_void};

/// Values of [`Any::type_index`] that this crate uses.
#[allow(missing_docs, reason = "the names are those of TVMFFITypeIndex")]
pub mod type_index {
    pub const NONE: i32 = 0;
    pub const INT: i32 = 1;
    pub const BOOL: i32 = 2;
    pub const FLOAT: i32 = 3;
    pub const OPAQUE_PTR: i32 = 4;
    pub const DATA_TYPE: i32 = 5;
    pub const DEVICE: i32 = 6;
    pub const DL_TENSOR_PTR: i32 = 7;
    pub const RAW_STR: i32 = 8;
    pub const BYTE_ARRAY_PTR: i32 = 9;
    pub const SMALL_STR: i32 = 11;
    pub const SMALL_BYTES: i32 = 12;
    /// The first index whose payload is an object.
    pub const OBJECT_BEGIN: i32 = 64;
    pub const STR: i32 = 65;
    pub const BYTES: i32 = 66;
    pub const ERROR: i32 = 67;
    pub const FUNCTION: i32 = 68;
    pub const TENSOR: i32 = 70;
    pub const ARRAY: i32 = 71;
    pub const LIST: i32 = 75;
}

/// Values of [`DlDevice::device_type`] that this crate uses.
#[allow(missing_docs, reason = "the names are those of DLDeviceType")]
pub mod device_type {
    pub const CPU: i32 = 1;
    pub const CUDA: i32 = 2;
}

/// `TVMFFIAny`: a tagged value.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Any {
    /// What the payload is.
    pub type_index: i32,
    /// Length of a small string or bytes; zero for everything else.
    pub small_len: u32,
    /// The payload.
    pub payload: Payload,
}

/// The payload of an [`Any`].
#[derive(Clone, Copy)]
#[repr(C)]
#[allow(missing_docs, reason = "one field per kind of payload, named by its type")]
pub union Payload {
    pub int64: i64,
    pub float64: f64,
    pub ptr: *const c_void,
    pub object: *mut ObjectHeader,
    pub bytes: [u8; 8],
    pub dtype: DlDataType,
    pub device: DlDevice,
}

impl Any {
    /// The value None, with all 16 bytes zero.
    pub const NONE: Self = Self::int_like(type_index::NONE, 0);

    /// A value whose payload is an integer.
    pub const fn int_like(type_index: i32, value: i64) -> Self {
        Self { type_index, small_len: 0, payload: Payload { int64: value } }
    }
}

/// `TVMFFIByteArray`: bytes by address and length, not NUL-terminated.
#[derive(Clone, Copy)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct ByteArray {
    pub data: *const c_char,
    pub size: usize,
}

/// `TVMFFIObject`: what every object starts with.
#[repr(C)]
pub struct ObjectHeader {
    /// Strong count in the low 32 bits, weak count in the high ones.
    pub combined_ref_count: u64,
    /// The object's type.
    pub type_index: i32,
    /// Zero.
    pub padding: u32,
    /// Frees the object's parts by the flag bits 1 (strong) and 2 (weak).
    pub deleter: Option<unsafe extern "C" fn(*mut c_void, c_int)>,
}

/// `TVMFFISeqCell`: what follows the header of an Array or List.
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct SeqCell {
    pub data: *mut Any,
    pub size: i64,
    pub capacity: i64,
    pub data_deleter: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// The first fields of `TVMFFIErrorCell`, which follows the header of an Error.
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct ErrorCell {
    pub kind: ByteArray,
    pub message: ByteArray,
    pub backtrace: ByteArray,
}

/// `TVMFFIVersion`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

/// `DLDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct DlDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

/// `DLDevice`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct DlDevice {
    pub device_type: i32,
    pub device_id: i32,
}

/// `DLTensor`: a tensor by address; shape and strides belong to somebody else.
#[derive(Clone, Copy)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct RawDlTensor {
    pub data: *mut c_void,
    pub device: DlDevice,
    pub ndim: i32,
    pub dtype: DlDataType,
    pub shape: *const i64,
    pub strides: *const i64,
    pub byte_offset: u64,
}

/// `DLPackVersion`.
#[derive(Clone, Copy)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct DlPackVersion {
    pub major: u32,
    pub minor: u32,
}

/// `DLManagedTensorVersioned`: a tensor together with its owner.
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of the C struct")]
pub struct DlManagedTensorVersioned {
    pub version: DlPackVersion,
    pub manager_ctx: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut DlManagedTensorVersioned)>,
    pub flags: u64,
    pub dl_tensor: RawDlTensor,
}

/// `SetError` of the allocator: context, kind and message as C strings.
pub type SetError = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char);

/// `DLPackManagedTensorAllocator`.
pub type TensorAllocator = unsafe extern "C" fn(
    *mut RawDlTensor,
    *mut *mut DlManagedTensorVersioned,
    *mut c_void,
    Option<SetError>,
) -> c_int;

/// `TVMFFISafeCallType`: every exported function has this type.
pub type SafeCall = unsafe extern "C" fn(*mut c_void, *const Any, i32, *mut Any) -> c_int;

macro_rules! assert_layout {
    ($ty:ty: $size:literal, $align:literal $(, $field:ident @ $offset:literal)*) => {
        const _: () = {
            assert!(size_of::<$ty>() == $size && align_of::<$ty>() == $align);
            $(assert!(std::mem::offset_of!($ty, $field) == $offset);)*
        };
    };
}
assert_layout!(Any: 16, 8, type_index @ 0, small_len @ 4, payload @ 8);
assert_layout!(ByteArray: 16, 8, data @ 0, size @ 8);
assert_layout!(ObjectHeader: 24, 8, combined_ref_count @ 0, type_index @ 8, padding @ 12, deleter @ 16);
assert_layout!(SeqCell: 32, 8, data @ 0, size @ 8, capacity @ 16, data_deleter @ 24);
assert_layout!(ErrorCell: 48, 8, kind @ 0, message @ 16, backtrace @ 32);
assert_layout!(Version: 12, 4, major @ 0, minor @ 4, patch @ 8);
assert_layout!(DlDataType: 4, 2, code @ 0, bits @ 1, lanes @ 2);
assert_layout!(DlDevice: 8, 4, device_type @ 0, device_id @ 4);
assert_layout!(RawDlTensor: 48, 8, data @ 0, device @ 8, ndim @ 16, dtype @ 20, shape @ 24, strides @ 32, byte_offset @ 40);
assert_layout!(DlManagedTensorVersioned: 80, 8, version @ 0, manager_ctx @ 8, deleter @ 16, flags @ 24, dl_tensor @ 32);
