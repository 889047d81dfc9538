//! Arguments, packed on the stack: [`Arg`], which a function is given, and
//! [`Packed`], which makes one of a Rust value.

use std::{
    cell::UnsafeCell,
    ffi::{CStr, c_void},
    marker::PhantomData,
};

use super::{
    abi::{self, Any, DlDataType, DlDevice, ObjectHeader, Payload, RawDlTensor, type_index},
    object::{BOTH_ONE, Object, Value},
};
use crate::{
    capture,
    device::Device,
    dtype::DType,
    tensor::{RawTensor, TensorMut, TensorRef},
};

impl DType {
    /// The DLPack type code, width in bits and lanes.
    pub const fn to_dlpack(self) -> DlDataType {
        let code = match self {
            Self::I8 | Self::I16 | Self::I32 | Self::I64 => 0,
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => 1,
            Self::F16 | Self::F32 | Self::F64 => 2,
            Self::BF16 => 4,
            Self::Bool => 6,
            Self::E4M3 => 10,
            Self::E5M2 => 12,
        };
        DlDataType { code, bits: 8 * self.size() as u8, lanes: 1 }
    }

    /// The element type of a DLPack type, if it has one here.
    pub(super) fn from_dlpack(dtype: DlDataType) -> Option<Self> {
        Self::ALL.into_iter().find(|own| own.to_dlpack() == dtype)
    }
}

impl Device {
    /// The DLPack device.
    pub const fn to_dlpack(self) -> DlDevice {
        match self {
            Self::Cpu => DlDevice { device_type: abi::device_type::CPU, device_id: 0 },
            Self::Cuda(ordinal) => {
                DlDevice { device_type: abi::device_type::CUDA, device_id: ordinal as i32 }
            }
        }
    }

    /// The device of a DLPack device, if it is one here.
    pub(super) fn from_dlpack(device: DlDevice) -> Option<Self> {
        match (device.device_type, u32::try_from(device.device_id)) {
            (abi::device_type::CPU, _) => Some(Self::Cpu),
            (abi::device_type::CUDA, Ok(ordinal)) => Some(Self::Cuda(ordinal)),
            _ => None,
        }
    }
}

/// A `DLTensor` that borrows shape and strides from a view. FlashInfer's
/// modules read the strides without a null check and ignore `byte_offset`, so
/// the strides are always given and the offset is always zero.
#[repr(transparent)]
pub struct DlTensor<'a> {
    raw: RawDlTensor,
    view: PhantomData<&'a RawTensor>,
}

impl<'a> DlTensor<'a> {
    pub(crate) fn new(tensor: &'a RawTensor) -> Self {
        capture::uses(tensor);
        let raw = RawDlTensor {
            data: tensor.data,
            device: tensor.device.to_dlpack(),
            ndim: tensor.shape().len() as i32,
            dtype: tensor.dtype.to_dlpack(),
            shape: tensor.shape().as_ptr(),
            strides: tensor.strides().as_ptr(),
            byte_offset: 0,
        };
        Self { raw, view: PhantomData }
    }
}

impl<'a> From<&'a TensorRef<'_>> for DlTensor<'a> {
    fn from(tensor: &'a TensorRef<'_>) -> Self {
        Self::new(&tensor.raw)
    }
}

impl<'a> From<&'a TensorMut<'_>> for DlTensor<'a> {
    fn from(tensor: &'a TensorMut<'_>) -> Self {
        Self::new(&tensor.raw)
    }
}

/// A tensor object made on the stack, for functions that take no `DLTensor`.
///
/// It starts with one reference, which is this value's and is never given
/// back, so the object's absent deleter is never called: a callee takes and
/// returns its own references within the call.
#[repr(C)]
pub struct TensorObject<'a> {
    header: UnsafeCell<ObjectHeader>,
    tensor: DlTensor<'a>,
}

impl<'a> TensorObject<'a> {
    pub(crate) fn new(tensor: &'a RawTensor) -> Self {
        let header = ObjectHeader {
            combined_ref_count: BOTH_ONE,
            type_index: type_index::TENSOR,
            padding: 0,
            deleter: None,
        };
        Self { header: UnsafeCell::new(header), tensor: DlTensor::new(tensor) }
    }
}

impl<'a> From<&'a TensorRef<'_>> for TensorObject<'a> {
    fn from(tensor: &'a TensorRef<'_>) -> Self {
        Self::new(&tensor.raw)
    }
}

/// One argument: a borrowed `TVMFFIAny`. What it points to lives for `'a`; the
/// callee keeps nothing of it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Arg<'a> {
    any: Any,
    borrowed: PhantomData<&'a ()>,
}

impl<'a> Arg<'a> {
    /// None: an absent optional.
    pub const NONE: Self = Self::new(Any::NONE);

    const fn new(any: Any) -> Self {
        Self { any, borrowed: PhantomData }
    }

    fn pointer(type_index: i32, pointer: *const c_void) -> Self {
        Self::new(Any { type_index, small_len: 0, payload: Payload { ptr: pointer } })
    }

    /// The tagged value.
    pub fn as_any(&self) -> &Any {
        &self.any
    }

    /// A string of at most 7 bytes, stored inline.
    pub fn small_str(text: &str) -> Option<Self> {
        let mut bytes = [0; 8];
        // The eighth byte stays zero, so that the text ends in a NUL.
        bytes[..7].get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(Self::new(Any {
            type_index: type_index::SMALL_STR,
            small_len: text.len() as u32,
            payload: Payload { bytes },
        }))
    }
}

impl From<i64> for Arg<'_> {
    fn from(value: i64) -> Self {
        Self::new(Any::int_like(type_index::INT, value))
    }
}

impl From<bool> for Arg<'_> {
    fn from(value: bool) -> Self {
        Self::new(Any::int_like(type_index::BOOL, value.into()))
    }
}

impl From<f64> for Arg<'_> {
    fn from(value: f64) -> Self {
        Self::new(Any { type_index: type_index::FLOAT, small_len: 0, payload: Payload { float64: value } })
    }
}

impl From<DType> for Arg<'_> {
    fn from(value: DType) -> Self {
        value.to_dlpack().into()
    }
}

impl From<DlDataType> for Arg<'_> {
    fn from(value: DlDataType) -> Self {
        // The union is written as an integer first, so that all 8 bytes are set.
        let mut any = Any::int_like(type_index::DATA_TYPE, 0);
        any.payload.dtype = value;
        Self::new(any)
    }
}

impl From<Device> for Arg<'_> {
    fn from(value: Device) -> Self {
        value.to_dlpack().into()
    }
}

impl From<DlDevice> for Arg<'_> {
    fn from(value: DlDevice) -> Self {
        let payload = Payload { device: value };
        Self::new(Any { type_index: type_index::DEVICE, small_len: 0, payload })
    }
}

impl<'a> From<&'a CStr> for Arg<'a> {
    fn from(value: &'a CStr) -> Self {
        Self::pointer(type_index::RAW_STR, value.as_ptr().cast())
    }
}

impl<'a> From<&'a DlTensor<'_>> for Arg<'a> {
    fn from(value: &'a DlTensor<'_>) -> Self {
        Self::pointer(type_index::DL_TENSOR_PTR, (&raw const value.raw).cast())
    }
}

impl<'a> From<&'a Object> for Arg<'a> {
    fn from(value: &'a Object) -> Self {
        Self::pointer(value.type_index(), value.as_ptr().cast())
    }
}

impl<'a> From<&'a TensorObject<'_>> for Arg<'a> {
    fn from(value: &'a TensorObject<'_>) -> Self {
        Self::pointer(type_index::TENSOR, (&raw const *value).cast())
    }
}

impl<'a, T> From<Option<T>> for Arg<'a>
where
    Arg<'a>: From<T>,
{
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::NONE, Into::into)
    }
}

/// A Rust value as an argument, with what the argument points to; see
/// [`args!`](crate::args), which makes them.
pub struct Packed<'a>(Holding<'a>);

enum Holding<'a> {
    Arg(Arg<'a>),
    Tensor(DlTensor<'a>),
    Object(Object),
}

impl Packed<'_> {
    /// The argument, as long as this value is there.
    pub fn as_arg(&self) -> Arg<'_> {
        match &self.0 {
            Holding::Arg(arg) => *arg,
            Holding::Tensor(tensor) => tensor.into(),
            Holding::Object(object) => object.into(),
        }
    }
}

macro_rules! packed {
    ($($ty:ty, |$value:ident| $holding:expr;)*) => {$(
        impl<'a> From<$ty> for Packed<'a> {
            fn from($value: $ty) -> Self {
                Self($holding)
            }
        }
    )*};
    // What is an argument by itself.
    (plain $($ty:ty),*) => { packed! { $($ty, |value| Holding::Arg(value.into());)* } };
    // Integers travel in 64 bits.
    (int $($ty:ty),*) => { packed! { $($ty, |value| Holding::Arg((value as i64).into());)* } };
}
packed!(plain Arg<'a>, bool, f64, DType, Device, &'a CStr, &'a DlTensor<'_>, &'a TensorObject<'_>, &'a Object);
packed!(int i8, i16, i32, i64, isize, u8, u16, u32, u64, usize);
packed! {
    f32, |value| Holding::Arg(f64::from(value).into());
    &'a TensorRef<'_>, |value| Holding::Tensor(value.into());
    &'a TensorMut<'_>, |value| Holding::Tensor(value.into());
    &'a mut TensorMut<'_>, |value| Holding::Tensor(DlTensor::new(&value.raw));
    &'a str, |value| Arg::small_str(value).map_or_else(|| Holding::Object(Object::text(value)), Holding::Arg);
    &'a String, |value| Self::from(value.as_str()).0;
    // SAFETY: integers point to nothing.
    &'a [i64], |value| Holding::Object(unsafe { Object::array(value.iter().map(|&item| item.into())) });
    &'a Vec<i64>, |value| Self::from(value.as_slice()).0;
    // SAFETY: the array takes references to the objects.
    &'a [Object], |value| Holding::Object(unsafe { Object::array(value.iter().map(Arg::from)) });
    &'a Vec<Object>, |value| Self::from(value.as_slice()).0;
    // Of a kind that this crate does not read, nothing can be passed on.
    &'a Value, |value| match value {
        Value::None | Value::Other(_) => Holding::Arg(Arg::NONE),
        Value::Int(number) => Holding::Arg((*number).into()),
        Value::Bool(flag) => Holding::Arg((*flag).into()),
        Value::Float(number) => Holding::Arg((*number).into()),
        Value::DType(dtype) => Holding::Arg((*dtype).into()),
        Value::Device(device) => Holding::Arg((*device).into()),
        Value::Text(text) => Self::from(text).0,
        Value::Object(object) => Holding::Arg(object.into()),
    };
}

impl<'a, const N: usize> From<&'a [i64; N]> for Packed<'a> {
    fn from(value: &'a [i64; N]) -> Self {
        Self::from(value.as_slice())
    }
}

impl<'a, T> From<Option<T>> for Packed<'a>
where
    Packed<'a>: From<T>,
{
    fn from(value: Option<T>) -> Self {
        value.map_or(Self(Holding::Arg(Arg::NONE)), Into::into)
    }
}

/// Packs the arguments of a call, as in `module.call("f", args![&x, 3, None])`.
///
/// | what the function takes | what is given |
/// |---|---|
/// | an integer | any integer type; `u64` and `usize` keep their 64 bits |
/// | a boolean, a float | `bool`; `f32`, `f64` |
/// | a string | `&str` or `&String` of any length; `&CStr` |
/// | a tensor (`DLTensor*`) | `&TensorRef`, `&TensorMut` or `&mut TensorMut` |
/// | a tensor object (`ffi.Tensor`) | `&ffi::TensorObject` |
/// | an element type, a device | [`DType`](crate::DType), [`Device`](crate::Device) |
/// | an array | `&[i64]`, `&[Object]`, and vectors of them |
/// | any object | [`&Object`](crate::ffi::Object) |
/// | what another function returned | [`&Value`](crate::ffi::Value); of a kind that is not read, it is None |
/// | an optional argument | `None`, or an `Option` of any of these |
///
/// It makes a `&[Arg]` that lives for the statement it stands in, so write it
/// where the call is. Strings of more than 7 bytes and arrays are allocated,
/// nothing else is.
///
/// ```
/// use flashinfer_rs::{TensorRef, args};
/// let data = [1.0f32, 2.0];
/// let x = TensorRef::from_slice(&data, &[2])?;
/// let scale: Option<f64> = None;
/// assert_eq!(args![&x, 3, true, "a string of some length", &[1, 2, 3], None, scale].len(), 7);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[macro_export]
macro_rules! args {
    (@ [$($packed:expr),*]) => { &[$($packed),*] as &[$crate::ffi::Arg<'_>] };
    (@ [$($packed:expr),*] None $(, $($rest:tt)*)?) => {
        $crate::args!(@ [$($packed,)* $crate::ffi::Arg::NONE] $($($rest)*)?)
    };
    (@ [$($packed:expr),*] $value:expr $(, $($rest:tt)*)?) => {
        $crate::args!(@ [$($packed,)* $crate::ffi::Packed::from($value).as_arg()] $($($rest)*)?)
    };
    ($($values:tt)*) => { $crate::args!(@ [] $($values)*) };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The 16 bytes of an argument, read as C would.
    fn words(arg: &Arg<'_>) -> (i32, u32, u64) {
        // SAFETY: every constructor writes all 8 bytes of the payload.
        let payload = unsafe { arg.as_any().payload.int64 } as u64;
        (arg.as_any().type_index, arg.as_any().small_len, payload)
    }

    proptest! {
        #[test]
        fn scalars_keep_their_bits(int: i64, float: f64, flag: bool) {
            prop_assert_eq!(words(&int.into()), (1, 0, int as u64));
            prop_assert_eq!(words(&float.into()), (3, 0, float.to_bits()));
            prop_assert_eq!(words(&flag.into()), (2, 0, flag.into()));
        }

        #[test]
        fn short_strings_are_inline(text in ".{0,4}") {
            match Arg::small_str(&text) {
                Some(arg) => {
                    let mut bytes = [0u8; 8];
                    bytes[..text.len()].copy_from_slice(text.as_bytes());
                    prop_assert_eq!(words(&arg), (11, text.len() as u32, u64::from_ne_bytes(bytes)));
                }
                None => prop_assert!(text.len() > 7),
            }
        }

        #[test]
        fn tensors_carry_shape_strides_and_type(
            shape in prop::collection::vec(0usize..5, 0..=5),
            gap in 1usize..4,
        ) {
            let mut strides = vec![0; shape.len()];
            let mut step = gap;
            for (stride, size) in strides.iter_mut().zip(&shape).rev() {
                *stride = step;
                step *= size.max(&1);
            }
            let storage = vec![half::bf16::ZERO; step];
            let view = TensorRef::from_slice_strided(&storage, &shape, Some(&strides)).unwrap();
            let dl = DlTensor::from(&view);
            let arg = Arg::from(&dl);
            prop_assert_eq!(words(&arg).0, 7);
            // SAFETY: the payload is the address of `dl`, which lives here.
            let raw = unsafe { &*arg.as_any().payload.ptr.cast::<RawDlTensor>() };
            prop_assert_eq!(raw.data.cast_const(), storage.as_ptr().cast());
            prop_assert_eq!(raw.ndim as usize, shape.len());
            prop_assert_eq!(raw.dtype, DlDataType { code: 4, bits: 16, lanes: 1 });
            prop_assert_eq!(raw.device, DlDevice { device_type: 1, device_id: 0 });
            prop_assert_eq!(raw.byte_offset, 0);
            for axis in 0..shape.len() {
                // SAFETY: shape and strides hold `ndim` numbers.
                let (size, stride) = unsafe { (*raw.shape.add(axis), *raw.strides.add(axis)) };
                prop_assert_eq!(size as usize, shape[axis]);
                // Without elements, strides mean nothing.
                prop_assert!(shape.contains(&0) || stride as usize == strides[axis]);
            }
        }
    }

    #[test]
    fn none_and_tags() {
        assert_eq!(words(&Arg::NONE), (0, 0, 0));
        assert_eq!(words(&Arg::from(None::<i64>)), (0, 0, 0));
        assert_eq!(words(&Arg::from(Some(7i64))), (1, 0, 7));
        // Little-endian (code, bits, lanes).
        assert_eq!(words(&Arg::from(DType::E4M3)), (5, 0, 0x0001_080a));
        assert_eq!(words(&Arg::from(Device::Cuda(3))), (6, 0, (3 << 32) | 2));
        let text = c"little";
        assert_eq!(words(&Arg::from(text)), (8, 0, text.as_ptr() as u64));
    }
}
