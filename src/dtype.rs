//! Element types.

use std::fmt;

use half::{bf16, f16};

/// Element types, with the names that FlashInfer's module names use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (`e4m3fn`).
    E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    E5M2,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 8-bit integer.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 64-bit integer.
    U64,
    /// Boolean, one byte.
    Bool,
}

impl DType {
    pub(crate) const ALL: [Self; 15] = [
        Self::F16,
        Self::BF16,
        Self::F32,
        Self::F64,
        Self::E4M3,
        Self::E5M2,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::U8,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::Bool,
    ];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::E4M3 | Self::E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// The spelling in FlashInfer's module names, such as `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::E4M3 => "e4m3",
            Self::E5M2 => "e5m2",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::Bool => "bool",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A type that can be an element of a tensor.
///
/// # Safety
/// `DTYPE` must describe the type's size and bit layout, and every bit pattern
/// that a kernel may write must be a value of the type. (`bool` is therefore
/// not an element of writable views: see [`DType::Bool`].)
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The element type's tag.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {$(
        // SAFETY: the size and layout of the type are those of the tag, and all
        // bit patterns are values of it.
        unsafe impl Element for $ty { const DTYPE: DType = DType::$dtype; }
    )*};
}
elements! {
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64,
    float8::F8E4M3 => E4M3, float8::F8E5M2 => E5M2,
    i8 => I8, i16 => I16, i32 => I32, i64 => I64,
    u8 => U8, u16 => U16, u32 => U32, u64 => U64,
}
