//! What the crate costs on this machine: bytes embedded, downloaded and cached; the time and the
//! memory of a first use.

use std::{
    collections::HashMap,
    fs,
    io::{self, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use flashinfer_rs::{
    FlashInferRuntime, ModuleName, RuntimeConfig,
    artifacts::{BundledMember, Progress, ProgressFn, Store},
};
use indicatif::HumanBytes;

use crate::{CommandError, Sources, printed, report::counted};

/// Prints it; `modules` are used first, which may download.
pub fn footprint(sources: &Sources, modules: &[ModuleName]) -> Result<bool, CommandError> {
    let config = sources.store_config()?;
    let embedded = config.bundle;
    let store = Store::open(config)?;
    let first_use = match modules {
        [] => None,
        modules => Some(FirstUse::measure(sources, &store, modules)?),
    };
    printed(write(&mut io::stdout().lock(), embedded, first_use.as_ref(), &store))?;
    Ok(true)
}

fn write(
    out: &mut impl Write,
    embedded: &[BundledMember],
    first_use: Option<&FirstUse>,
    store: &Store,
) -> io::Result<()> {
    writeln!(out, "Embedded in this program, compressed and unpacked")?;
    let mut sum = (0, 0);
    for member in embedded {
        let (packed, size) = (member.zstd.len() as u64, member.size);
        let name = member.suffix.rsplit('/').next().unwrap_or_default();
        writeln!(out, "{packed:>12} {size:>12}  {name}")?;
        sum = (sum.0 + packed, sum.1 + size);
    }
    writeln!(out, "{:>12} {:>12}  {}", sum.0, sum.1, counted(embedded.len(), "file"))?;
    if let Some(FirstUse { modules, downloaded, took, memory }) = first_use {
        writeln!(out, "\nFirst use")?;
        for (module, size, source) in modules {
            writeln!(out, "{size:>12}  {module}: {source}")?;
        }
        writeln!(out, "{downloaded:>12}  bytes downloaded in {:.2} s", took.as_secs_f64())?;
        if let Some(memory) = memory {
            writeln!(out, "{memory:>12}  bytes of memory at most, for the whole process")?;
        }
    }
    let (cache, mut files) = (store.cache_dir(), store.cache_files()?);
    files.retain(|(_, size)| *size > 0);
    writeln!(out, "\nIn the cache {}", cache.display())?;
    for (path, size) in &files {
        writeln!(out, "{size:>12}  {}", path.strip_prefix(cache).unwrap_or(path).display())?;
    }
    let sum = files.iter().map(|(_, size)| size).sum();
    writeln!(out, "{sum:>12}  {} ({})", counted(files.len(), "file"), HumanBytes(sum))
}

/// What it took to start the runtime and to open modules.
struct FirstUse {
    modules: Vec<(String, u64, String)>,
    downloaded: u64,
    took: Duration,
    memory: Option<u64>,
}

impl FirstUse {
    fn measure(sources: &Sources, store: &Store, names: &[ModuleName]) -> Result<FirstUse, CommandError> {
        let downloaded = Arc::new(AtomicU64::new(0));
        let mut config = RuntimeConfig::default();
        config.wheels = sources.wheels.clone();
        config.cache_dir = sources.cache_dir.clone();
        config.offline = store.config().offline;
        config.progress = Some(counting(&downloaded));
        let start = Instant::now();
        let runtime = FlashInferRuntime::initialize(config)?;
        runtime.preload(names)?;
        let took = start.elapsed();
        let modules = names.iter().map(|name| {
            let module = runtime.module(name)?;
            let size = fs::metadata(module.path())?.len();
            Ok((name.to_string(), size, module.source().to_string()))
        });
        Ok(FirstUse {
            modules: modules.collect::<Result<_, CommandError>>()?,
            downloaded: downloaded.load(Ordering::Relaxed),
            took,
            memory: peak_memory(),
        })
    }
}

/// Counts the bytes of downloads.
fn counting(sum: &Arc<AtomicU64>) -> ProgressFn {
    let sum = Arc::clone(sum);
    // Where the download of each wheel is, and whether it tells of its bytes.
    let places = Mutex::new(HashMap::<String, (u64, bool)>::new());
    Arc::new(move |progress| {
        let mut places = places.lock().unwrap_or_else(PoisonError::into_inner);
        let more = match *progress {
            Progress::Started { file, done, .. } => {
                places.insert(file.into(), (done, false));
                0
            }
            Progress::Bytes { file, done, .. } => {
                let before = places.insert(file.into(), (done, true));
                done.saturating_sub(before.map_or(0, |(before, _)| before))
            }
            // pip tells nothing before it is done.
            Progress::Done { file, path } if places.get(file) == Some(&(0, false)) => {
                fs::metadata(path).map_or(0, |metadata| metadata.len())
            }
            _ => 0,
        };
        sum.fetch_add(more, Ordering::Relaxed);
    })
}

/// The most memory that this process has had, where the system tells it.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_in_turn_are_counted_each_for_itself() {
        let sum = Arc::new(AtomicU64::new(0));
        let tell = counting(&sum);
        let folder = tempfile::tempdir().unwrap();
        let path = &folder.path().join("c.whl");
        fs::write(path, [0; 7]).unwrap();
        let started = |file, done| tell(&Progress::Started { file, done, total: None });
        let bytes = |file, done| tell(&Progress::Bytes { file, done, total: None });
        let done = |file| tell(&Progress::Done { file, path });
        // Members of a, then one of b, then a goes on; pip brings c, of which nothing is told.
        started("a", 0);
        bytes("a", 1000);
        done("a");
        started("b", 50);
        bytes("b", 100);
        done("b");
        bytes("a", 1200);
        done("a");
        started("c", 0);
        done("c");
        assert_eq!(sum.load(Ordering::Relaxed), 1000 + 50 + 200 + 7);
    }
}
