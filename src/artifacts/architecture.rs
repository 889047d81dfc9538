//! Architectures of GPUs, and which code runs where.

use std::fmt;

/// What machine code was compiled for, or what a GPU is, as in `sm90a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CudaArchitecture {
    major: u32,
    minor: u32,
    features: Features,
}

/// The instructions that code may use, by the suffix of its architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Features {
    /// Those of every later GPU of its major version.
    Plain,
    /// `f`: those of its family.
    Family,
    /// `a`: those of this very GPU.
    Specific,
}

impl CudaArchitecture {
    /// An architecture, for generated code.
    #[allow(dead_code, reason = "only a bundle with modules of a provider has one")]
    pub(crate) const fn new(major: u32, minor: u32, features: Features) -> CudaArchitecture {
        CudaArchitecture { major, minor, features }
    }

    /// A GPU's, by its compute capability, as upstream compiles for it.
    pub const fn of_gpu(major: u32, minor: u32) -> CudaArchitecture {
        let features = match (major, minor) {
            (..=8, _) => Features::Plain,
            (12, 0) => Features::Family,
            _ => Features::Specific,
        };
        CudaArchitecture { major, minor, features }
    }

    /// Reads `sm90a`, `sm_90a`, `sm120f` or `sm80`.
    pub fn parse(text: &str) -> Option<CudaArchitecture> {
        let text = text.strip_prefix("sm")?;
        let text = text.strip_prefix('_').unwrap_or(text);
        let (digits, features) = match text.as_bytes().last()? {
            b'a' => (&text[..text.len() - 1], Features::Specific),
            b'f' => (&text[..text.len() - 1], Features::Family),
            _ => (text, Features::Plain),
        };
        if !(2..=3).contains(&digits.len()) || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        let (major, minor) = digits.split_at(digits.len() - 1);
        Some(CudaArchitecture { major: major.parse().ok()?, minor: minor.parse().ok()?, features })
    }

    /// The expression of this value, for generated code.
    pub(crate) fn code(self) -> String {
        let CudaArchitecture { major, minor, features } = self;
        format!("CudaArchitecture::new({major}, {minor}, Features::{features:?})")
    }

    /// How well code of this architecture serves a GPU; `None` where it does not run.
    ///
    /// Code with the suffix `a` runs on its own compute capability only; other machine code runs on
    /// later ones of its major version, too. Upstream prefers the same architecture, then `a`, then
    /// `f`, and of equals the higher minor version.
    fn fit(self, gpu: CudaArchitecture) -> Option<(u32, u32)> {
        let capability = |of: CudaArchitecture| (of.major, of.minor);
        let rank = match self.features {
            _ if self == gpu => 4,
            Features::Specific if capability(self) == capability(gpu) => 3,
            Features::Specific => return None,
            _ if self.major != gpu.major || self.minor > gpu.minor => return None,
            Features::Family => 2,
            Features::Plain => 1,
        };
        Some((rank, self.minor))
    }
}

impl fmt::Display for CudaArchitecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = match self.features {
            Features::Plain => "",
            Features::Family => "f",
            Features::Specific => "a",
        };
        write!(f, "sm{}{}{suffix}", self.major, self.minor)
    }
}

/// How well code that was compiled for `code`, for each in turn, serves all of these GPUs, the worst
/// served first; `None` where one of them cannot run it. Code that suits better compares higher.
pub fn fit(code: &[CudaArchitecture], gpus: &[CudaArchitecture]) -> Option<Vec<(u32, u32)>> {
    let best = |gpu: &CudaArchitecture| code.iter().filter_map(|code| code.fit(*gpu)).max();
    let mut fits = gpus.iter().map(best).collect::<Option<Vec<_>>>()?;
    fits.sort_unstable();
    Some(fits)
}

/// Architectures in words: "sm80, sm89 and sm90a".
pub(crate) fn listed(architectures: &[CudaArchitecture]) -> String {
    let names: Vec<_> = architectures.iter().map(CudaArchitecture::to_string).collect();
    match names.as_slice() {
        [others @ .., last] if !others.is_empty() => format!("{} and {last}", others.join(", ")),
        names => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(names: &str) -> Vec<CudaArchitecture> {
        names.split_whitespace().map(|name| CudaArchitecture::parse(name).unwrap()).collect()
    }

    #[test]
    fn names_are_read_and_written() {
        for name in ["sm75", "sm80", "sm90a", "sm100a", "sm103f", "sm120f"] {
            let read = CudaArchitecture::parse(name).unwrap();
            assert_eq!(read.to_string(), name);
            assert_eq!(CudaArchitecture::parse(&name.replace("sm", "sm_")), Some(read));
        }
        for (gpu, name) in [((8, 9), "sm89"), ((9, 0), "sm90a"), ((10, 3), "sm103a"), ((12, 0), "sm120f")] {
            assert_eq!(CudaArchitecture::of_gpu(gpu.0, gpu.1).to_string(), name);
        }
        for name in ["", "sm", "sm9", "sm9a", "sm1000", "sm90b", "sm90aa", "90a", "sm__90", "sm9é", "sm+90"]
        {
            assert_eq!(CudaArchitecture::parse(name), None, "{name}");
        }
    }

    /// The GPU, the providers at hand, and the one that upstream takes.
    #[test]
    fn the_best_provider_is_upstreams_choice() {
        let published = "sm80 sm89 sm90a sm100a sm103a sm120f";
        for (gpu, providers, want) in [
            ((9, 0), published, "sm90a"),
            ((8, 0), published, "sm80"),
            ((8, 6), published, "sm80"),
            ((8, 9), published, "sm89"),
            ((10, 0), published, "sm100a"),
            ((10, 3), published, "sm103a"),
            ((12, 0), published, "sm120f"),
            ((12, 1), published, "sm120f"),
            ((7, 5), published, ""),
            ((11, 0), published, ""),
            ((10, 1), published, ""),
            // The same architecture, then `a`, `f` and plain.
            ((9, 0), "sm90f sm90a sm90", "sm90a"),
            ((9, 0), "sm90 sm90f", "sm90f"),
            ((12, 0), "sm120 sm120a sm120f", "sm120f"),
            ((12, 0), "sm120 sm120a", "sm120a"),
            ((12, 1), "sm121f sm121a sm120f", "sm121a"),
            ((8, 6), "sm86 sm86a sm86f", "sm86"),
            ((10, 3), "sm100f sm102", "sm100f"),
            // Of equals, the higher minor version.
            ((10, 3), "sm103f sm100f", "sm103f"),
            ((8, 9), "sm80 sm86", "sm86"),
            ((8, 9), "sm86 sm80", "sm86"),
            // Neither a later one nor another major version.
            ((8, 6), "sm89 sm90a", ""),
            ((10, 0), "sm103a sm103f sm90", ""),
            ((9, 0), "", ""),
        ] {
            let providers = read(providers);
            let gpu = [CudaArchitecture::of_gpu(gpu.0, gpu.1)];
            let fits = providers.iter().filter_map(|code| Some((fit(&[*code], &gpu)?, *code)));
            let best = fits.max().map_or(String::new(), |(_, code)| code.to_string());
            assert_eq!(best, want, "{gpu:?} of {providers:?}");
        }
    }

    #[test]
    fn code_must_run_on_every_gpu() {
        assert_eq!(fit(&read("sm80"), &read("sm86 sm80")), Some(vec![(1, 0), (4, 0)]));
        assert_eq!(fit(&read("sm90a"), &read("sm90 sm80")), None);
        assert_eq!(fit(&read("sm90a sm80"), &read("sm90a sm86")), Some(vec![(1, 0), (4, 0)]));
        // The worst served counts first.
        assert!(fit(&read("sm86"), &read("sm86 sm89")) > fit(&read("sm80"), &read("sm86 sm89")));
        assert_eq!(fit(&[], &read("sm90")), None);
    }
}
