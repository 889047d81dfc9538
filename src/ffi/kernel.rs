//! Functions of modules as the crate declares and calls them.
//!
//! [`kernels!`] turns a declaration into a struct with a field for each
//! argument, which is how the crate's own code calls the function, and into the
//! [`Signature`]s that versions of it have had. Which of them a module has is
//! found once, when the function is looked up, by what the module prints of it; a
//! call packs the arguments of that one.

use super::{Arg, ArgKind, DlTensor, Function, Object, Signature, Value};
use crate::{error::Result, stream::Stream};

/// A function of which it is known which declared [`Signature`] it has.
#[derive(Clone, Copy, Debug)]
pub struct KernelFunction {
    function: Function,
    /// The place of its signature among those declared.
    variant: usize,
}

impl KernelFunction {
    /// A function that has the declared signature of this place.
    pub(crate) fn new(function: Function, variant: usize) -> Self {
        Self { function, variant }
    }

    /// The function's name.
    pub fn name(&self) -> &'static str {
        self.function.name()
    }

    /// The function, to be called with arguments of one's own packing.
    pub(crate) fn function(&self) -> &Function {
        &self.function
    }

    /// Which of the declared signatures it has, by its place.
    pub(crate) fn variant(&self) -> usize {
        self.variant
    }
}

/// The Rust side of each [`ArgKind`].
pub(crate) mod kind {
    use super::*;

    /// How an argument of one kind is held and packed.
    pub(crate) trait Kind {
        const KIND: ArgKind;
        type Value<'a>;
        fn pack<'a>(value: &'a Self::Value<'_>) -> Arg<'a>;
    }

    macro_rules! kinds {
        ($($name:ident: $value:ty, |$arg:ident| $pack:expr;)*) => {$(
            pub(crate) enum $name {}
            impl Kind for $name {
                const KIND: ArgKind = ArgKind::$name;
                type Value<'a> = $value;
                fn pack<'a>($arg: &'a Self::Value<'_>) -> Arg<'a> { $pack }
            }
        )*};
    }
    kinds! {
        Tensor: DlTensor<'a>, |value| value.into();
        OptTensor: Option<DlTensor<'a>>, |value| value.as_ref().into();
        TensorObject: crate::ffi::TensorObject<'a>, |value| value.into();
        OptTensorObject: Option<crate::ffi::TensorObject<'a>>, |value| value.as_ref().into();
        Int: i64, |value| (*value).into();
        Bool: bool, |value| (*value).into();
        Float: f64, |value| (*value).into();
        Str: &'static std::ffi::CStr, |value| (*value).into();
        IntArray: &'a Object, |value| (*value).into();
    }
}

/// A declared function together with one call's arguments.
pub trait Kernel {
    /// What the function takes and returns, in each version in which that
    /// changed, oldest first.
    const SIGNATURES: &'static [Signature];

    /// Packs the arguments that the function takes on the stack, and calls it.
    ///
    /// # Errors
    /// What the function raised.
    ///
    /// # Safety
    /// The arguments must be what a function with these signatures assumes; see
    /// [`Function::call`].
    unsafe fn call(&self, function: &KernelFunction, stream: &Stream) -> Result<Value>;
}

/// Declares functions of modules: a struct with a field for each argument, in
/// order, which implements [`Kernel`].
///
/// Where versions differ, the fields are the arguments of all of them, and a list
/// for each version says which ones it takes, in which order, and what it returns.
/// An argument that a version takes as another kind is followed by that kind:
///
/// ```text
/// struct TopK = "topk" { input: Tensor, values: Tensor, k: Int, sorted: Bool } {
///     "0.6.13": (input, values, k) -> "void";
///     "0.7.0": (input, values: OptTensor, k, sorted) -> "void";
/// }
/// ```
macro_rules! kernels {
    () => {};
    ($(#[$doc:meta])* $vis:vis struct $name:ident = $function:literal (
        $($arg:ident: $kind:ident),* $(,)?
    ) -> $result:literal; $($rest:tt)*) => {
        $crate::ffi::kernels! {
            $(#[$doc])* $vis struct $name = $function { $($arg: $kind),* } {
                "0.6.13": ($($arg),*) -> $result;
            }
            $($rest)*
        }
    };
    ($(#[$doc:meta])* $vis:vis struct $name:ident = $function:literal {
        $($field:ident: $kind:ident),* $(,)?
    } {
        $($since:literal: ($($arg:ident $(: $as:ident)?),* $(,)?) -> $result:literal;)+
    } $($rest:tt)*) => {
        $(#[$doc])*
        $vis struct $name<'a> {
            $(pub(crate) $field: <$crate::ffi::kind::$kind as $crate::ffi::kind::Kind>::Value<'a>,)*
        }

        impl $crate::ffi::Kernel for $name<'_> {
            const SIGNATURES: &'static [$crate::ffi::Signature] = {
                $(#[allow(non_upper_case_globals, dead_code, reason = "named after the field")]
                const $field: $crate::ffi::ArgKind =
                    <$crate::ffi::kind::$kind as $crate::ffi::kind::Kind>::KIND;)*
                &[$($crate::ffi::Signature {
                    function: $function,
                    since: $since,
                    args: &[$((stringify!($arg), $crate::ffi::kernels!(@kind $arg $($as)?))),*],
                    result: $result,
                }),+]
            };

            unsafe fn call(
                &self,
                function: &$crate::ffi::KernelFunction,
                stream: &$crate::stream::Stream,
            ) -> $crate::error::Result<$crate::ffi::Value> {
                use $crate::ffi::kind::Kind;
                $(let $field = <$crate::ffi::kind::$kind as Kind>::pack(&self.$field);)*
                let lists = [$(&[$($arg),*] as &[$crate::ffi::Arg<'_>]),+];
                // SAFETY: promised by the caller.
                unsafe { function.function().call_on(stream, lists[function.variant()]) }
            }
        }

        $crate::ffi::kernels! { $($rest)* }
    };
    (@kind $arg:ident) => { $arg };
    (@kind $arg:ident $as:ident) => { <$crate::ffi::kind::$as as $crate::ffi::kind::Kind>::KIND };
}
pub(crate) use kernels;
