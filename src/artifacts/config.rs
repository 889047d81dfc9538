//! Where a store looks, and what it may do: settings of the program and of the environment.

use super::bundle::{self, BundledMember};
use super::pins::Pins;
use super::{ArtifactError, CudaArchitecture, ProgressFn};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Tells the architectures of the GPUs that kernels are for; none where no GPU is seen.
pub type GpusFn = Arc<dyn Fn() -> Vec<CudaArchitecture> + Send + Sync>;

/// Where a store looks, and what it may do.
#[derive(Clone)]
#[non_exhaustive]
pub struct StoreConfig {
    /// Wheels, or folders of them, that are asked first.
    pub wheels: Vec<PathBuf>,
    /// Wheels, or folders of them, that are asked second: those of `FLASHINFER_RS_WHEELS`.
    pub env_wheels: Vec<PathBuf>,
    /// The cache folder; `None` stands for `flashinfer-rs` in the platform's cache folder. A
    /// relative path starts at the working folder of the process.
    pub cache_dir: Option<PathBuf>,
    /// The embedded members.
    pub bundle: &'static [BundledMember],
    /// Whether downloads are forbidden.
    pub offline: bool,
    /// The pinned wheels.
    pub pins: Pins,
    /// The simple index that is asked for registry packages; `None` stands for the machine's own
    /// settings.
    pub index_url: Option<String>,
    /// Asked once, when a wheel with code for certain GPUs is met: such a wheel is passed over
    /// unless it serves all of these, and of several the one that suits best comes first. Without an
    /// answer, the first in order is taken.
    pub gpus: Option<GpusFn>,
    /// Called with the progress of long operations.
    pub progress: Option<ProgressFn>,
    /// Limits of downloads.
    pub fetch_options: FetchOptions,
}

impl StoreConfig {
    /// A configuration that reads nothing from the environment: no wheels, no bundle, offline.
    pub fn new(pins: Pins) -> StoreConfig {
        StoreConfig {
            wheels: Vec::new(),
            env_wheels: Vec::new(),
            cache_dir: None,
            bundle: &[],
            offline: true,
            pins,
            index_url: None,
            gpus: None,
            progress: None,
            fetch_options: FetchOptions::default(),
        }
    }

    /// The configuration of the environment: `FLASHINFER_RS_WHEELS` (a list of paths, written
    /// like `PATH`), `FLASHINFER_RS_CACHE_DIR` (a relative path lies in the platform's cache
    /// folder), `FLASHINFER_RS_OFFLINE` (`1` or `0`), `FLASHINFER_RS_INDEX_URL`, this crate's pins,
    /// those of `FLASHINFER_RS_PINS` (a manifest, as [`Pins::extend`] takes it), and its embedded
    /// bundle.
    ///
    /// # Errors
    /// [`ArtifactError::Setting`] when a variable has a value that means nothing,
    /// [`ArtifactError::Pins`] when the pin table cannot be read, and
    /// [`ArtifactError::NoCacheDir`] when a relative cache folder has no place.
    pub fn from_env() -> Result<StoreConfig, ArtifactError> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let mut pins = Pins::built_in()?;
        pins.extend_by_setting(set("FLASHINFER_RS_PINS").map(PathBuf::from))?;
        let mut config = StoreConfig::new(pins);
        if let Some(list) = set("FLASHINFER_RS_WHEELS") {
            let paths = std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty());
            config.env_wheels = paths.collect();
        }
        config.cache_dir = set("FLASHINFER_RS_CACHE_DIR").map(named_cache_dir).transpose()?;
        let offline = set("FLASHINFER_RS_OFFLINE").map(|v| v.to_string_lossy().into_owned());
        config.offline = flag("FLASHINFER_RS_OFFLINE", offline.as_deref())?;
        config.index_url = set("FLASHINFER_RS_INDEX_URL").map(|v| v.to_string_lossy().into_owned());
        config.bundle = bundle::embedded();
        Ok(config)
    }
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The index address may hold a password.
        f.debug_struct("StoreConfig")
            .field("wheels", &self.wheels)
            .field("env_wheels", &self.env_wheels)
            .field("cache_dir", &self.cache_dir)
            .field("bundle", &self.bundle.len())
            .field("offline", &self.offline)
            .field("pins", &self.pins)
            .field("index_url", &self.index_url.is_some())
            .field("fetch_options", &self.fetch_options)
            .finish_non_exhaustive()
    }
}

/// Whether a look-up may download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Download the pinned wheel, or the member of it alone, when no local source holds it.
    Allowed,
    /// Use local sources only.
    Forbidden,
}

/// Limits of network operations. The defaults suit slow lines and large wheels.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Limit of resolving a name, and of connecting.
    pub connect_timeout: Duration,
    /// Limit of waiting for the next bytes before the connection counts as broken.
    pub stall_timeout: Duration,
    /// The bytes per second that a server must send, over [`FetchOptions::rate_window`]; 0 for
    /// any. A slower connection counts as broken, and an attempt that brings less than this rate
    /// makes of the window as one in vain.
    pub min_rate: u64,
    /// How long a server may be slower than [`FetchOptions::min_rate`].
    pub rate_window: Duration,
    /// Limit of asking a package index for one page.
    pub page_timeout: Duration,
    /// Attempts in a row that bring nothing new, or next to nothing, before a download is given
    /// up.
    pub attempts: u32,
    /// Pause after the first such attempt; it doubles with each further one.
    pub retry_delay: Duration,
    /// Limit of waiting for another process that holds a file's lock.
    pub lock_timeout: Duration,
    /// Limit of one run of pip.
    pub pip_timeout: Duration,
}

impl Default for FetchOptions {
    fn default() -> Self {
        FetchOptions {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            min_rate: 1 << 10,
            rate_window: Duration::from_secs(30),
            page_timeout: Duration::from_secs(2 * 60),
            attempts: 5,
            retry_delay: Duration::from_millis(500),
            lock_timeout: Duration::from_secs(2 * 60 * 60),
            pip_timeout: Duration::from_secs(10 * 60),
        }
    }
}

impl FetchOptions {
    /// The bytes that must come in a window.
    #[cfg(feature = "fetch")]
    pub(crate) fn least(&self) -> u64 {
        (self.min_rate as f64 * self.rate_window.as_secs_f64()) as u64
    }
}

/// The folder that `FLASHINFER_RS_CACHE_DIR` names. A relative one lies in the platform's cache
/// folder: the build script, a program and its tests each run in another folder, and must mean the
/// same one.
pub(crate) fn named_cache_dir(value: OsString) -> Result<PathBuf, ArtifactError> {
    let named = PathBuf::from(value);
    if named.is_absolute() {
        return Ok(named);
    }
    Ok(dirs::cache_dir().ok_or(ArtifactError::NoCacheDir)?.join(named))
}

/// Reads a variable that is on or off.
pub(crate) fn flag(variable: &'static str, value: Option<&str>) -> Result<bool, ArtifactError> {
    match value.unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "0" | "false" | "no" | "off" => Ok(false),
        "1" | "true" | "yes" | "on" => Ok(true),
        other => Err(ArtifactError::Setting { variable, value: other.into(), expected: "`1` or `0`".into() }),
    }
}
