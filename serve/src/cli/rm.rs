//! `flashinfer rm MODEL…`: removes models.

use indicatif::DecimalBytes;

use super::out::say;
use crate::{
    Result,
    hub::{Hub, ModelName},
};

/// Remove models that were fetched
#[derive(clap::Args)]
pub struct Args {
    /// As `flashinfer list` shows them
    #[arg(required = true)]
    models: Vec<ModelName>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let hub = Hub::from_env()?;
    for model in &args.models {
        let freed = hub.remove(model)?;
        say!("removed {model}, {} freed", DecimalBytes(freed));
    }
    Ok(())
}
