//! `flashinfer list`: the models on this machine.

use indicatif::DecimalBytes;

use super::out::say;
use crate::{Result, hub::Hub};

/// Show the models on this machine, and their sizes
#[derive(clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_: &Args) -> Result<()> {
    let models = Hub::from_env()?.list()?;
    let width = models.iter().map(|model| model.name.chars().count()).max().unwrap_or(0).max("NAME".len());
    say!("{:width$}  SIZE", "NAME");
    for model in models {
        let rest = if model.complete { "" } else { ", incomplete" };
        say!("{:width$}  {}{rest}", model.name, DecimalBytes(model.size));
    }
    Ok(())
}
