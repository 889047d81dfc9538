//! stub
use std::path::PathBuf;
use std::sync::Arc;
pub type ProgressFn = Arc<dyn Fn(&u8) + Send + Sync>;
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("x")]
    X,
}
#[derive(Clone, Copy)]
pub enum Fetch {
    Allowed,
    Forbidden,
}
#[derive(Debug, Clone)]
pub enum Source {
    Embedded,
}
impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("x")
    }
}
#[derive(Debug, Clone)]
pub struct Located {
    pub path: PathBuf,
    pub source: Source,
}
pub enum Member {
    Module(String),
    TvmFfi,
    CudaRuntime,
}
impl Member {
    pub fn module(n: impl Into<String>) -> Self {
        Member::Module(n.into())
    }
}
pub struct StoreConfig {
    pub wheels: Vec<PathBuf>,
    pub cache_dir: Option<PathBuf>,
    pub offline: bool,
    pub progress: Option<ProgressFn>,
}
impl StoreConfig {
    pub fn from_env() -> Result<Self, ArtifactError> {
        Err(ArtifactError::X)
    }
}
pub struct Store;
impl Store {
    pub fn open(_: StoreConfig) -> Result<Store, ArtifactError> {
        Ok(Store)
    }
    pub fn locate(&self, _: &Member, _: Fetch) -> Result<Located, ArtifactError> {
        Err(ArtifactError::X)
    }
}
