//! What a function takes and returns, in words that can be compared.
//!
//! A module called with a wrong number of arguments answers with its own
//! signature. Held against those that the crate declares, it tells on any
//! machine, without a GPU, which of them it is, or that it is another.

use std::fmt;

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

/// A function's name, the names and kinds of its arguments, and what it
/// returns: all of it as one version of the library has it, and those after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The function, without the prefix `__tvm_ffi_`.
    pub function: &'static str,
    /// The first version known to have it so, as in `0.6.13`.
    pub since: &'static str,
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

    /// Which of the declared signatures of one function a module printed.
    ///
    /// # Errors
    /// None of them: the first difference from the only one, or what was printed
    /// and what is declared.
    pub fn find(declared: &[Self], printed: &str) -> Result<usize, String> {
        if let [only] = declared {
            return only.compare(printed).map(|()| 0);
        }
        if let Some(place) = declared.iter().position(|signature| signature.compare(printed).is_ok()) {
            return Ok(place);
        }
        let known: Vec<_> =
            declared.iter().map(|signature| format!("since {} `{signature}`", signature.since)).collect();
        Err(format!("the module has `{printed}`; declared are {}", known.join(", ")))
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

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: Signature = Signature {
        function: "add",
        since: "1.0",
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
        let nothing = Signature { function: "ask", since: "1.0", args: &[], result: "bool" };
        assert_eq!(nothing.compare("ask() -> bool"), Ok(()));
        assert!(nothing.compare("ask(0: int) -> bool").unwrap_err().contains("takes 1 arguments"));
    }
    #[test]
    fn of_several_signatures_the_printed_one_is_found() {
        let later = Signature { since: "1.2", args: &[("out", ArgKind::Tensor)], ..ADD };
        let declared = [ADD, later];
        assert_eq!(Signature::find(&declared, &ADD.to_string()), Ok(0));
        assert_eq!(Signature::find(&declared, "add(0: DLTensor*) -> void"), Ok(1));
        let unknown = "add(0: DLTensor*, 1: int) -> void";
        let message = Signature::find(&declared, unknown).unwrap_err();
        for part in [unknown, &ADD.to_string(), "since 1.2 `add(0: DLTensor*) -> void`"] {
            assert!(message.contains(part), "no {part} in: {message}");
        }
        // Of one alone, the difference is named.
        let message = Signature::find(&[ADD], unknown).unwrap_err();
        assert!(message.contains("takes 2 arguments, declared are 3"), "{message}");
    }
}
