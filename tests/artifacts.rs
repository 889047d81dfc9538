//! Where modules come from: wheels, indexes, downloads, the cache, and what goes wrong there.

mod artifact_support;

mod artifacts {
    #[cfg(feature = "fetch")]
    mod chosen;
    #[cfg(all(feature = "fetch", target_os = "linux"))]
    mod faults;
    #[cfg(feature = "fetch")]
    mod fetch;
    #[cfg(feature = "fetch")]
    mod index;
    mod providers;
    #[cfg(feature = "fetch")]
    mod proxy;
    #[cfg(feature = "fetch")]
    mod release;
    #[cfg(feature = "fetch")]
    mod remote;
    mod store;
    #[cfg(feature = "fetch")]
    mod tls;
}
