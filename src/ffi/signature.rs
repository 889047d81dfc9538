//! What a function takes, declared once.
//!
//! [`kernels!`] turns a declaration into a struct with one field per argument,
//! which is how the crate's own code calls the function, and into a
//! [`Signature`]. A module called with no arguments answers with its own
//! signature, so the two can be compared on any machine, before a changed
//! wheel meets a GPU.

use std::fmt;

use super::{Arg, DlTensor, Function, Object, Value};
use crate::{error::Result, stream::Stream};

/// The kind of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArgKind {
    /// A tensor view (`DLTensor*`).
    Tensor,
    /// A tensor view or None.
    OptTensor,
    /// A tensor object.
    TensorObject,
    /// A tensor object or None.
    OptTensorObject,
    /// An integer.
    Int,
    /// A boolean.
    Bool,
    /// A float.
    Float,
    /// A string.
    Str,
    /// An array of integers.
    IntArray,
}

impl ArgKind {
    /// The words with which TVM-FFI prints each kind.
    const SPELLINGS: [(Self, &'static str); 9] = [
        (Self::Tensor, "DLTensor*"),
        (Self::OptTensor, "Optional<DLTensor*>"),
        (Self::TensorObject, "ffi.Tensor"),
        (Self::OptTensorObject, "Optional<ffi.Tensor>"),
        (Self::Int, "int"),
        (Self::Bool, "bool"),
        (Self::Float, "float"),
        (Self::Str, "std::string"),
        (Self::IntArray, "Array<int>"),
    ];

    fn spelling(self) -> &'static str {
        Self::SPELLINGS.iter().find(|(kind, _)| *kind == self).map_or("?", |(_, text)| text)
    }
}

/// A function's name, the names and kinds of its arguments, and whether it
/// returns anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The function, without the prefix `__tvm_ffi_`.
    pub function: &'static str,
    /// Names and kinds, in order.
    pub args: &'static [(&'static str, ArgKind)],
    /// The result as TVM-FFI prints it: `void`, `Array<int>`, `bool`, ….
    pub result: &'static str,
}

impl Signature {
    /// Compares this declaration with the signature that a module printed,
    /// such as `rmsnorm(0: DLTensor*, …) -> void`. The text may stand inside a
    /// longer message, between backquotes.
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn compare(&self, printed: &str) -> Result<(), String> {
        let text = printed.split('`').nth(1).unwrap_or(printed);
        let expected = self.to_string();
        if text == expected {
            return Ok(());
        }
        let list = |text: &str| -> Option<(String, Vec<String>, String)> {
            let (name, rest) = text.split_once('(')?;
            let (args, result) = rest.rsplit_once(") -> ")?;
            let kind = |arg: &str| arg.split_once(": ").map_or(arg, |(_, kind)| kind).to_owned();
            let args = args.split(", ").filter(|arg| !arg.is_empty()).map(kind).collect();
            Some((name.to_owned(), args, result.to_owned()))
        };
        let (Some(theirs), Some(ours)) = (list(text), list(&expected)) else {
            return Err(format!("`{text}` is not a signature; expected `{expected}`"));
        };
        if theirs.0 != ours.0 {
            return Err(format!("the module says its name is {}, declared is {}", theirs.0, ours.0));
        }
        if theirs.1.len() != ours.1.len() {
            return Err(format!(
                "{}: the module takes {} arguments, declared are {}",
                self.function,
                theirs.1.len(),
                ours.1.len()
            ));
        }
        for ((theirs, ours), (name, _)) in theirs.1.iter().zip(&ours.1).zip(self.args) {
            if theirs != ours {
                return Err(format!(
                    "{}: argument {name}: the module takes `{theirs}`, declared is `{ours}`",
                    self.function
                ));
            }
        }
        Err(format!("{}: the module returns `{}`, declared is `{}`", self.function, theirs.2, ours.2))
    }
}

/// Prints as TVM-FFI does.
impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.function)?;
        for (index, (_, kind)) in self.args.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{index}: {}", kind.spelling())?;
        }
        write!(f, ") -> {}", self.result)
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
    /// What the function takes and returns.
    const SIGNATURE: Signature;

    /// Packs the arguments on the stack and calls the function.
    ///
    /// # Errors
    /// What the function raised.
    ///
    /// # Safety
    /// `function` must have this signature, and the arguments must be what it
    /// assumes; see [`Function::call`].
    unsafe fn call(&self, function: &Function, stream: &Stream) -> Result<Value>;
}

/// Declares functions of modules: a struct with a field for each argument, in
/// order, which implements [`Kernel`].
macro_rules! kernels {
    ($($(#[$doc:meta])* $vis:vis struct $name:ident = $function:literal (
        $($arg:ident: $kind:ident),* $(,)?
    ) -> $result:literal;)*) => {$(
        $(#[$doc])*
        $vis struct $name<'a> {
            $(pub(crate) $arg: <$crate::ffi::kind::$kind as $crate::ffi::kind::Kind>::Value<'a>,)*
        }

        impl $crate::ffi::Kernel for $name<'_> {
            const SIGNATURE: $crate::ffi::Signature = $crate::ffi::Signature {
                function: $function,
                args: &[$((stringify!($arg), <$crate::ffi::kind::$kind as $crate::ffi::kind::Kind>::KIND)),*],
                result: $result,
            };

            unsafe fn call(
                &self,
                function: &$crate::ffi::Function,
                stream: &$crate::stream::Stream,
            ) -> $crate::error::Result<$crate::ffi::Value> {
                use $crate::ffi::kind::Kind;
                let args = [$(<$crate::ffi::kind::$kind as Kind>::pack(&self.$arg)),*];
                // SAFETY: promised by the caller.
                unsafe { function.call_on(stream, &args) }
            }
        }
    )*};
}
pub(crate) use kernels;

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: Signature = Signature {
        function: "add",
        args: &[("out", ArgKind::Tensor), ("scale", ArgKind::Float), ("plan", ArgKind::IntArray)],
        result: "void",
    };

    #[test]
    fn differences_are_named() {
        let same = "add(0: DLTensor*, 1: float, 2: Array<int>) -> void";
        assert_eq!(ADD.to_string(), same);
        assert_eq!(ADD.compare(same), Ok(()));
        assert_eq!(
            ADD.compare(&format!("Mismatched number of arguments when calling: `{same}`. Expected 3")),
            Ok(())
        );
        let differs = |text: &str, words: &str| {
            let message = ADD.compare(text).unwrap_err();
            assert!(message.contains(words), "{message}");
        };
        differs("add(0: DLTensor*, 1: int, 2: Array<int>) -> void", "argument scale");
        differs("add(0: DLTensor*, 1: float) -> void", "takes 2 arguments, declared are 3");
        differs("sub(0: DLTensor*, 1: float, 2: Array<int>) -> void", "name is sub");
        differs("add(0: DLTensor*, 1: float, 2: Array<int>) -> bool", "returns `bool`");
        differs("nonsense", "is not a signature");
        let nothing = Signature { function: "ask", args: &[], result: "bool" };
        assert_eq!(nothing.compare("ask() -> bool"), Ok(()));
        assert!(nothing.compare("ask(0: int) -> bool").unwrap_err().contains("takes 1 arguments"));
    }
}
