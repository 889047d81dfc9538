//! What each source of a store holds, for people and programs that ask.

use super::pins::Pin;
use super::source::Source;
use super::store::{NOTHING_EMBEDDED, Store};
use super::user_wheels::{OTHER_PROVIDER, empty_folder, expand};
use super::version::{self, FlashInferVersion};
use super::wheel::Wheel;
use super::{ArtifactError, Member, Package};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One source, as a person wants to see it.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct SourceReport {
    /// What the source is, in human words.
    pub source: String,
    /// Its wheel or folder, if it has one.
    pub path: Option<PathBuf>,
    /// Whether it can serve at least one member now.
    pub usable: bool,
    /// The version of FlashInfer whose modules it holds, where it says so.
    pub version: Option<String>,
    /// The architectures that its modules were compiled for, where it is a provider's wheel.
    pub architectures: Vec<String>,
    /// The names of the modules it holds.
    pub modules: Vec<String>,
    /// The file names of the libraries it holds.
    pub libraries: Vec<String>,
    /// What is wrong, or why it serves nothing.
    pub problem: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Store {
    /// Each source in order: what it is, whether it is usable, what it holds. Of the pinned
    /// wheels, those that kernels need.
    pub fn inventory(&self) -> Vec<SourceReport> {
        let mut reports = Vec::new();
        for (from_env, path) in self.user_paths() {
            let source = if from_env { Source::Env } else { Source::Config };
            match expand(path) {
                Ok(wheels) if wheels.is_empty() => {
                    let empty = empty_folder(path, source(path.clone()));
                    reports.push(SourceReport::absent(
                        empty.source,
                        Some(path.clone()),
                        empty.outcome,
                        empty.remedy,
                    ));
                }
                Ok(wheels) => reports.extend(wheels.into_iter().map(|wheel| {
                    let opened = self.check_machine(&wheel).and_then(|()| self.wheel(&wheel, None));
                    self.of_user_wheel(source(wheel), opened)
                })),
                Err(e) => {
                    let wheel = source(path.clone());
                    reports.push(SourceReport::wheel(wheel, Err(e)));
                }
            }
        }
        reports.push(self.bundle_report());
        let providers = self.config.pins.providers().map(|(package, _)| package);
        for package in providers.chain(Package::KERNELS).collect::<Vec<_>>() {
            let name = format!("pinned wheel of {package}");
            let pin = match self.config.pins.get(package.clone()) {
                Ok(pin) => pin,
                Err(e) => {
                    let remedy = "name wheels in FLASHINFER_RS_WHEELS".into();
                    reports.push(SourceReport::absent(name, None, e.to_string(), remedy));
                    continue;
                }
            };
            let at = self.cache.wheels().path(&pin.file);
            let opened =
                self.cached(pin, |wheel| Ok(SourceReport::of(Source::CachedWheel(at.clone()), wheel)));
            let report = match opened {
                Ok(Some((_, report))) => report,
                Ok(None) => match self.members_report(pin, &at) {
                    Ok(Some(report)) => report,
                    Ok(None) => SourceReport::absent(
                        name,
                        Some(at),
                        "it is not in the cache".into(),
                        format!(
                            "run `flashinfer-doctor fetch {package}`; with downloads allowed it is also \
                             fetched at first use"
                        ),
                    ),
                    Err(e) => SourceReport::wheel(Source::CachedMember(pin.file.clone()), Err(e)),
                },
                Err(e) => SourceReport::wheel(Source::CachedWheel(at), Err(e)),
            };
            reports.push(report);
        }
        reports.push(self.download_report());
        reports
    }

    /// The names of every module that a local source holds, sorted, each once. Sources that
    /// cannot be read are left out; [`Store::inventory`] reports them.
    pub fn modules(&self) -> Vec<String> {
        let reports = self.inventory().into_iter();
        let names: BTreeSet<_> = reports.flat_map(|report| report.modules).collect();
        names.into_iter().collect()
    }

    /// A wheel that the user named: also why it serves nothing here.
    fn of_user_wheel(&self, source: Source, wheel: Result<Arc<Wheel>, ArtifactError>) -> SourceReport {
        let explained = wheel.as_ref().ok().and_then(|wheel| match wheel.version() {
            Some(version) if !wheel.shim_of().is_empty() => Some(self.explain_shim(version, wheel)),
            Some(version) if !version.is_called() && !wheel.modules().is_empty() => Some((
                format!("it is of FlashInfer {version}, and this crate calls {}", version::called()),
                "use a wheel of one of these".to_owned(),
            )),
            _ => self.unfit(wheel.architectures()).map(|unfit| (unfit, OTHER_PROVIDER.to_owned())),
        });
        let report = SourceReport::wheel(source, wheel);
        match explained {
            Some((problem, remedy)) => {
                SourceReport { usable: false, problem: Some(problem), remedy: Some(remedy), ..report }
            }
            None => report,
        }
    }

    /// The members of a pinned wheel that are in the cache without it, if any are.
    fn members_report(&self, pin: &Pin, at: &Path) -> Result<Option<SourceReport>, ArtifactError> {
        let Some(listed) = self.listed(pin)? else { return Ok(None) };
        let held = |member: &Member| {
            let at = (listed.artifact_hash(), &*member.folder(), &*member.file_name());
            let found = listed.find(member).ok().flatten();
            found.is_some_and(|recorded| self.cache.seems_held(at, recorded.size))
        };
        let report = SourceReport::holding(Source::CachedMember(pin.file.clone()), &listed, held);
        Ok(report.usable.then(|| SourceReport { path: Some(at.into()), ..report }))
    }

    fn bundle_report(&self) -> SourceReport {
        let source = Source::Embedded.to_string();
        if self.config.bundle.is_empty() {
            let problem = "nothing was embedded at build time".into();
            let remedy = NOTHING_EMBEDDED.into();
            return SourceReport::absent(source, None, problem, remedy);
        }
        let (modules, libraries) = self
            .config
            .bundle
            .iter()
            .filter_map(|entry| entry.suffix.rsplit('/').next().map(|file| (entry, file)))
            .partition::<Vec<_>, _>(|(entry, _)| entry.suffix.contains("/jit_cache/"));
        let name = |file: &str| file.trim_end_matches(".so").to_owned();
        SourceReport {
            source,
            path: None,
            usable: true,
            version: shown(self.config.bundle.iter().filter_map(|entry| entry.version)),
            architectures: self
                .config
                .bundle
                .iter()
                .flat_map(|entry| entry.architectures)
                .collect::<BTreeSet<_>>()
                .into_iter()
                .map(ToString::to_string)
                .collect(),
            modules: modules.iter().map(|(_, file)| name(file)).collect(),
            libraries: libraries.iter().map(|(_, file)| (*file).into()).collect(),
            problem: None,
            remedy: None,
        }
    }

    fn download_report(&self) -> SourceReport {
        let (problem, remedy) = if cfg!(not(feature = "fetch")) {
            ("this program was built without it", "build with the feature `fetch`")
        } else if self.config.offline {
            ("downloads are forbidden", "unset FLASHINFER_RS_OFFLINE")
        } else {
            ("", "")
        };
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        SourceReport {
            source: "download of pinned wheels".into(),
            path: None,
            usable: problem.is_empty(),
            version: None,
            architectures: Vec::new(),
            modules: Vec::new(),
            libraries: Vec::new(),
            problem: some(problem),
            remedy: some(remedy),
        }
    }
}

/// The versions, each once, in words.
fn shown(versions: impl Iterator<Item = FlashInferVersion>) -> Option<String> {
    let versions: BTreeSet<_> = versions.collect();
    let names: Vec<_> = versions.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

impl SourceReport {
    fn absent(source: String, path: Option<PathBuf>, problem: String, remedy: String) -> SourceReport {
        SourceReport {
            source,
            path,
            usable: false,
            version: None,
            architectures: Vec::new(),
            modules: Vec::new(),
            libraries: Vec::new(),
            problem: Some(problem),
            remedy: Some(remedy),
        }
    }

    fn wheel(source: Source, wheel: Result<Arc<Wheel>, ArtifactError>) -> SourceReport {
        match wheel {
            Ok(wheel) => SourceReport::of(source, &wheel),
            Err(e) => {
                let remedy = match e {
                    ArtifactError::DigestMismatch { .. } => "run `flashinfer-doctor fetch`",
                    ArtifactError::OtherMachine { .. } => "leave it out of the list",
                    _ => "correct the path, or obtain the wheel again",
                };
                let path = source.path().map(Path::to_owned);
                SourceReport::absent(source.to_string(), path, e.to_string(), remedy.into())
            }
        }
    }

    /// What a wheel holds.
    fn of(source: Source, wheel: &Wheel) -> SourceReport {
        let path = source.path().map(Path::to_owned);
        // A module that cannot be had is listed, so that its use tells why.
        let held = |member: &Member| match member {
            Member::Module(_) => true,
            other => matches!(wheel.find(other), Ok(Some(_))),
        };
        let report = SourceReport::holding(source, wheel, held);
        SourceReport { path, ..report }
    }

    /// What a wheel holds of what `held` accepts.
    fn holding(source: Source, wheel: &Wheel, held: impl Fn(&Member) -> bool) -> SourceReport {
        let mut modules = wheel.modules();
        modules.retain(|name| held(&Member::module(name.as_str())));
        let libraries = Member::LIBRARIES.into_iter().filter(|member| held(member));
        let libraries = libraries.map(|member| member.file_name()).collect::<Vec<_>>();
        let usable = !modules.is_empty() || !libraries.is_empty();
        SourceReport {
            source: source.to_string(),
            path: None,
            usable,
            version: wheel.version().map(|version| version.to_string()),
            architectures: wheel.architectures().iter().map(ToString::to_string).collect(),
            modules,
            libraries,
            problem: (!usable).then(|| "it holds no module and no library".into()),
            remedy: (!usable)
                .then(|| "leave it out of the list, unless a program wants another file of it".into()),
        }
    }
}
