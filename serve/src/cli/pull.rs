//! `flashinfer pull MODEL`: fetches a model.

use super::out::say;
use crate::{
    Result,
    hub::{Hub, ModelName},
};

/// Fetch a model, or what has changed of it
#[derive(clap::Args)]
pub struct Args {
    /// `smollm2`, `hf.co/ORG/REPO[@REVISION][:FILE or QUANTIZATION]`, or `https://HOST/FILE#sha256=DIGEST`
    model: ModelName,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    for path in Hub::from_env()?.pull(&args.model)? {
        say!("{}", path.display());
    }
    Ok(())
}
