//! The members that a build embeds, out of the sources that it may use.

use super::super::config::named_cache_dir;
use super::super::pins::Pins;
use super::super::user_wheels::expand;
use super::super::{ArtifactError, Fetch, Member, Package, Progress, Store, StoreConfig};
use super::mode::Mode;
use super::modules::{matches, patterns, shown};
use super::network::{NoNetwork, no_network};
use super::output::Bundle;
use super::{Build, Outcome};
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

/// The members of a build and the store that serves them.
pub(super) struct Selection {
    store: Store,
    mode: Mode,
    no_network: Option<NoNetwork>,
    patterns: Vec<String>,
    /// The folder for files that the cache cannot take.
    aside: PathBuf,
    outcome: Outcome,
    /// What is not embedded, and why.
    missing: Vec<(String, String)>,
}

impl Selection {
    pub(super) fn new(
        build: &Build<'_>,
        mode: Mode,
        pins: Pins,
        outcome: Outcome,
    ) -> Result<Selection, ArtifactError> {
        let env = |name: &str| (build.env)(name).filter(|value| !value.is_empty());
        let mut config = StoreConfig::new(pins);
        if let Some(list) = env("FLASHINFER_RS_WHEELS") {
            let paths = std::env::split_paths(&list).filter(|p| !p.as_os_str().is_empty());
            // A build script runs in its package's folder, which nobody means.
            config.env_wheels = paths.map(|path| build.command.folder().join(path)).collect();
        }
        for path in &config.env_wheels {
            expand(path)?;
        }
        config.index_url = env("FLASHINFER_RS_INDEX_URL");
        // docs.rs must build whatever the settings.
        let mode = if env("DOCS_RS").is_some() { Mode::Auto } else { mode };
        let mut no_network = no_network(build, mode)?;
        let named = env("FLASHINFER_RS_CACHE_DIR");
        config.cache_dir = named.map(|named| named_cache_dir(named.into())).transpose()?;
        let aside = build.out_dir.join("cache");
        if config.cache_dir.is_none() && dirs::cache_dir().is_none() {
            no_network.get_or_insert(NoNetwork::NoCache);
            config.cache_dir = Some(aside.clone());
        }
        config.offline = no_network.is_some();
        config.progress = build.progress.clone();
        let mut selection = Selection {
            store: Store::open(config)?,
            mode,
            no_network,
            patterns: patterns(build.env),
            aside,
            outcome,
            missing: Vec::new(),
        };
        let config = selection.store.config();
        let pins = Package::KERNELS.into_iter().filter_map(|package| config.pins.get(package).ok());
        let pinned = pins.map(|pin| selection.wheels().join(&pin.file)).filter(|wheel| wheel.is_file());
        selection.outcome.inputs = config.env_wheels.iter().cloned().chain(pinned).collect();
        Ok(selection)
    }

    /// Where downloaded wheels are.
    fn wheels(&self) -> PathBuf {
        self.store.cache_dir().join("wheels")
    }

    fn fetch(&self) -> Fetch {
        if self.no_network.is_some() { Fetch::Forbidden } else { Fetch::Allowed }
    }

    /// Asks the store; where the cache cannot be written, as in a sandbox, a store that works
    /// beside the output, where no whole wheel belongs.
    fn ask<T>(&mut self, ask: impl Fn(&Self) -> Result<T, ArtifactError>) -> Result<T, ArtifactError> {
        match ask(self) {
            Err(ArtifactError::Cache { .. }) if self.store.cache_dir() != self.aside => {
                let mut config = self.store.config().clone();
                (config.cache_dir, config.offline) = (Some(self.aside.clone()), true);
                self.store = Store::open(config)?;
                self.no_network.get_or_insert(NoNetwork::NoCache);
                ask(self)
            }
            done => done,
        }
    }

    /// Writes the members, and says what is missing.
    pub(super) fn embed(mut self, mut bundle: Bundle) -> Result<Outcome, ArtifactError> {
        let modules = self.modules()?;
        let members = modules.into_iter().map(Member::Module);
        for member in members.chain([Member::TvmFfi, Member::CudaRuntime]) {
            match self.ask(|selection| selection.store.locate(&member, selection.fetch())) {
                Ok(located) => bundle.add(&located)?,
                Err(e) => self.missing(member.to_string(), e)?,
            }
        }
        self.outcome.embedded = bundle.count();
        bundle.finish()?;
        self.look_again();
        self.warn();
        Ok(self.outcome)
    }

    /// The modules that the patterns choose, each once. The pinned wheel, or its list of modules
    /// where members can be fetched alone, is fetched only for patterns that no local source
    /// serves.
    fn modules(&mut self) -> Result<Vec<String>, ArtifactError> {
        let mut known = self.store.modules();
        let unserved = |known: &[String], patterns: &[String]| {
            let served = |p: &String| known.iter().any(|name| matches(p, name));
            let unserved = patterns.iter().filter(|p| !served(p));
            unserved.cloned().collect::<Vec<_>>()
        };
        let mut missing = unserved(&known, &self.patterns);
        if !missing.is_empty() {
            self.announce();
            let why = match self.ask(|selection| selection.store.pinned_modules()) {
                Ok(pinned) => {
                    known.extend(pinned);
                    known.sort();
                    known.dedup();
                    missing = unserved(&known, &self.patterns);
                    None
                }
                Err(ArtifactError::Offline { what, reason }) => Some(match self.no_network {
                    Some(why) => format!("{what} is not downloaded: {why}"),
                    None => format!("{what} is not downloaded: {reason}"),
                }),
                Err(e @ ArtifactError::Download { .. }) => Some(e.to_string()),
                Err(e) => return self.missing("kernel modules".into(), e).map(|()| Vec::new()),
            };
            if !missing.is_empty() {
                let patterns = shown(&missing);
                let what = format!("kernel modules ({patterns}) of FLASHINFER_RS_EMBED_MODULES");
                self.missing(what, ArtifactError::NoSuchModule { patterns, known: known.len(), why })?;
            }
        }
        let chosen = |name: &String| self.patterns.iter().any(|p| matches(p, name));
        Ok(known.into_iter().filter(chosen).collect())
    }

    /// Says that a large download begins, before the server answers.
    fn announce(&self) {
        let config = self.store.config();
        if let (None, Some(on_progress)) = (self.no_network, &config.progress)
            && let Ok(pin) = config.pins.get(Package::JitCache)
            && !self.wheels().join(&pin.file).is_file()
        {
            on_progress(&Progress::Started { file: &pin.file, done: 0, total: None });
        }
    }

    /// Something cannot be embedded: an error, or something to tell.
    fn missing(&mut self, what: String, error: ArtifactError) -> Result<(), ArtifactError> {
        use ArtifactError as E;
        match error {
            E::DigestMismatch { .. } | E::BadWheel { .. } | E::UnsafeMember { .. } => Err(error),
            _ if self.mode == Mode::Require && self.no_network == Some(NoNetwork::OnlyChecks) => {
                self.outcome.pending = true;
                Ok(())
            }
            error if self.mode == Mode::Require => Err(error),
            error => {
                let why = match (self.no_network, error) {
                    (
                        Some(why),
                        E::NotFound { .. } | E::Offline { .. } | E::NoSuchModule { why: Some(_), .. },
                    ) => {
                        format!("no local source holds it; not downloaded: {why}")
                    }
                    (None, E::NoSuchModule { why: Some(why), .. }) => why,
                    (_, E::NotFound { mut searched, .. }) => {
                        searched.pop().map_or_else(String::new, |last| last.outcome)
                    }
                    (_, error) => error.to_string(),
                };
                self.missing.push((what, why.replace('\n', " ")));
                Ok(())
            }
        }
    }

    /// Names the folder that a download of somebody else changes, so that a later command embeds
    /// what it brings.
    fn look_again(&mut self) {
        let wheels = self.wheels();
        let make = || -> io::Result<()> {
            fs::create_dir_all(&wheels)?;
            // What is newer than this run's start would make cargo run the script once more.
            File::open(&wheels)?.set_modified(SystemTime::UNIX_EPOCH)
        };
        let watched = match self.no_network {
            _ if self.missing.is_empty() || wheels.starts_with(&self.aside) => false,
            // This run itself may have written there.
            None => false,
            // A path that is not there would make cargo run the script for ever.
            Some(NoNetwork::OnlyChecks) => wheels.is_dir() || make().is_ok(),
            Some(_) => wheels.is_dir(),
        };
        self.outcome.inputs.extend(watched.then_some(wheels));
    }

    /// One line for each reason why something is missing, with what happens at run time.
    fn warn(&mut self) {
        while let Some((_, why)) = self.missing.first().cloned() {
            let (same, others) = self.missing.drain(..).partition(|(_, other)| *other == why);
            self.missing = others;
            let same: Vec<(String, String)> = same;
            let what: Vec<_> = same.into_iter().map(|(what, _)| what).collect();
            self.outcome.warnings.push(format!(
                "not embedded: {} ({why}). At run time it is taken from FLASHINFER_RS_WHEELS or the \
                 cache, or downloaded at first use",
                what.join(", ")
            ));
        }
    }
}
