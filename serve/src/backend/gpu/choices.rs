//! Which kernels were the fastest for products, kept in the cache folder: they are measured once for a
//! GPU, a driver, a version of cuBLASLt, and one of this program.
//!
//! A file that cannot be read is as none, and one that cannot be written costs time at the next start:
//! neither is an error.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::Result;

/// What was chosen for a product.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProductChoice {
    /// The algorithm, as cuBLASLt has it.
    pub algorithm: [u64; 8],
    /// What the fastest kernel for few rows gains, if there are any.
    pub gain: Option<Gain>,
}

impl ProductChoice {
    /// Whether it was made among so many kernels for few rows.
    pub fn is_among(&self, kernels: usize) -> bool {
        match self.gain {
            Some(gain) => gain.kernel < kernels,
            None => kernels == 0,
        }
    }
}

/// What a kernel for few rows gains against cuBLASLt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gain {
    /// Which of those kernels.
    pub kernel: usize,
    /// What it takes less for all layers; negative if it takes more.
    pub milliseconds: f32,
}

/// The choices for products, by what tells them apart.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// What they were measured on.
    measured_on: String,
    products: BTreeMap<String, ProductChoice>,
}

/// Choices, and the file that they are in.
#[derive(Debug)]
pub struct Choices {
    path: PathBuf,
    kept: Kept,
    changed: bool,
}

impl Choices {
    /// Those of a file in `folder` that were measured on the same; else none.
    pub fn open(folder: &Path, measured_on: String) -> Self {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-');
        let name: String =
            measured_on.chars().map(|letter| if is_plain(letter) { letter } else { '_' }).collect();
        let path = folder.join(format!("{name}.json"));
        let kept = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let kept = kept.filter(|kept| kept.measured_on == measured_on);
        let kept = kept.unwrap_or_else(|| Kept { measured_on, products: BTreeMap::new() });
        Self { path, kept, changed: false }
    }

    pub fn get(&self, product: &str) -> Option<ProductChoice> {
        self.kept.products.get(product).copied()
    }

    pub fn insert(&mut self, product: String, choice: ProductChoice) {
        self.changed |= self.kept.products.insert(product, choice) != Some(choice);
    }

    /// Writes the file, if there is anything new. Programs that write at once leave what the last one had.
    pub fn save(&mut self) {
        if std::mem::take(&mut self.changed) {
            // The next start measures again.
            self.write().ok();
        }
    }

    fn write(&self) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let mut file = NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec_pretty(&self.kept)?)?;
        file.persist(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHOICE: ProductChoice =
        ProductChoice { algorithm: [1, 2, 3, 4, 5, 6, 7, u64::MAX], gain: Some(GAIN) };
    const GAIN: Gain = Gain { kernel: 1, milliseconds: 0.5 };

    fn open(folder: &Path) -> Choices {
        Choices::open(folder, "NVIDIA H200, driver 13000".into())
    }

    #[test]
    fn choices_are_kept_for_what_they_were_measured_on() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("products");
        let mut choices = open(&folder);
        assert_eq!(choices.get("one"), None);
        choices.save();
        assert!(!folder.exists(), "nothing is new");
        choices.insert("one".into(), CHOICE);
        choices.save();
        assert_eq!(open(&folder).get("one"), Some(CHOICE));
        let other = Choices::open(&folder, "NVIDIA H200, driver 13010".into());
        assert_eq!(other.get("one"), None);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_broken_or_of_another_gpu_is_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let mut choices = open(folder.path());
        choices.insert("one".into(), CHOICE);
        choices.save();
        let whole = fs::read(&choices.path).unwrap();
        for broken in [&whole[..whole.len() / 2], b"", b"[]", b"\xff\xfe"] {
            fs::write(&choices.path, broken).unwrap();
            let mut again = open(folder.path());
            assert_eq!(again.get("one"), None);
            again.insert("two".into(), CHOICE);
            again.save();
            assert_eq!(open(folder.path()).get("two"), Some(CHOICE));
        }
        let renamed = String::from_utf8(whole).unwrap().replace("H200", "H100");
        fs::write(&choices.path, renamed).unwrap();
        assert_eq!(open(folder.path()).get("one"), None);
    }

    #[test]
    fn a_choice_among_other_kernels_is_none() {
        let without = ProductChoice { gain: None, ..CHOICE };
        assert_eq!([0, 1, 2, 3].map(|kernels| CHOICE.is_among(kernels)), [false, false, true, true]);
        assert_eq!([0, 1].map(|kernels| without.is_among(kernels)), [true, false]);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let mut choices = open(&file.join("products"));
        choices.insert("one".into(), CHOICE);
        choices.save();
        assert_eq!(choices.get("one"), Some(CHOICE));
    }
}
