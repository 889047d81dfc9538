//! Where models come from: names to files.

use std::path::{Path, PathBuf};

use flashinfer_rs::artifacts::{Fetch, Member, Store, StoreConfig};

use crate::Result;

/// The name of the pinned model, SmolLM2-135M-Instruct.
pub const SMOLLM2: &str = "smollm2";

/// The file of a model: of the pinned one by its name, fetched if no local source
/// has it, else that of a path.
pub fn locate(model: &str) -> Result<PathBuf> {
    if model != SMOLLM2 {
        let path = Path::new(model);
        return match path.is_file() {
            true => Ok(path.into()),
            false => {
                Err(format!("no model is called `{model}`: expected {SMOLLM2}, or the path of a GGUF file")
                    .into())
            }
        };
    }
    let mut config = StoreConfig::from_env()?;
    config.progress = Some(flashinfer_rs::progress::terminal());
    Ok(Store::open(config)?.locate(&Member::SmolLm2, Fetch::Allowed)?.path)
}
