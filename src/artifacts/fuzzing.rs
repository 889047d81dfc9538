//! What `fuzz/` tries with bytes of any kind, and what must hold of whatever is read of them.

#[cfg(feature = "fetch")]
use super::pages;
use super::record::{self, MAX_RECORD};
use super::wheel::{self, Wheel};
use super::{CudaKey, FlashInferVersion, Member, Package, Pins, kernels};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::Path;

const NAME: &str = "fuzzed-1.0-py3-none-any.whl";

/// Bytes as text, with marks for what is none.
pub fn text_of(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// A wheel: its directory, its `RECORD`, and all of its members.
pub fn wheel(bytes: &[u8]) {
    let path = Path::new(NAME);
    let Ok(mut archive) = wheel::archive(path, Cursor::new(bytes)) else { return };
    let Ok((wheel, record)) = Wheel::read(path, &mut archive, None) else { return };
    assert!(record.len() as u64 <= MAX_RECORD);
    find_all(&wheel);
    let _ = wheel.verify_in(&mut archive, |read, all| assert!(read <= all));
}

/// A `RECORD`, without the wheel.
pub fn record(bytes: &[u8]) {
    let path = Path::new(NAME);
    let Ok(lines) = record::lines(path, bytes) else { return };
    let names: BTreeSet<_> = lines.iter().map(|(name, ..)| name).collect();
    assert_eq!(names.len(), lines.len(), "a name is there twice");
    if let Ok(wheel) = Wheel::listed(path, bytes) {
        find_all(&wheel);
    }
}

fn find_all(wheel: &Wheel) {
    let modules = wheel.modules().into_iter().map(Member::Module);
    for member in modules.chain(Member::LIBRARIES) {
        let _ = wheel.find(&member);
    }
}

/// What a provider's wheel says of its modules, and a shim's of its providers.
pub fn manifest(bytes: &[u8]) {
    let provider = "sm90a";
    let read = kernels::read_manifest(bytes, provider, "flashinfer_jit_cache_sm90a-0.7.4", &["norm"].into());
    if let Ok(architectures) = read {
        assert!(!architectures.is_empty());
    }
    kernels::read_requirements(&text_of(bytes));
}

/// A page of a package index, in HTML or in JSON.
#[cfg(feature = "fetch")]
pub fn index_page(bytes: &[u8]) {
    let at = url::Url::parse("https://index.example/simple/package/").expect("an address");
    let Ok((links, base)) = pages::read(&text_of(bytes), &at) else { return };
    assert!(!base.cannot_be_a_base(), "{base}");
    for link in links {
        assert!(link.reference.len() <= pages::MAX_ADDRESS && link.file.len() <= 3 * pages::MAX_ADDRESS);
        let _ = base.join(&link.reference);
    }
}

/// A member of this name: what is accepted stays in its folder of the cache.
pub fn member(name: &str) {
    for member in
        [Member::module(name), Member::File { package: Package::Other("model".into()), suffix: name.into() }]
    {
        if member.check().is_ok() {
            let place = Path::new(&*member.folder()).join(member.file_name());
            let plain = |part| matches!(part, std::path::Component::Normal(_));
            assert!(place.components().all(plain) && place.components().count() == 2, "{name:?}");
            assert!(Member::may_be_at(&member.folder(), &member.file_name()), "{name:?}");
        }
    }
}

/// A table of pins, and the versions in it.
pub fn pins(bytes: &[u8]) {
    let text = text_of(bytes);
    if let Some(version) = FlashInferVersion::parse(&text) {
        assert_eq!(FlashInferVersion::parse(&version.to_string()), Some(version));
    }
    CudaKey::parse(&text);
    let mut built_in = Pins::built_in().expect("the crate's own pins");
    let before = built_in.clone();
    let added = built_in.extend(&text);
    assert!(added.is_ok() || built_in == before, "some pins of a refused table were added");
    let Ok(pins) = Pins::parse(&text, CudaKey::new(13, 0), "x86_64") else { return };
    for package in Package::PINNED {
        let Ok(pin) = pins.get(package) else { continue };
        assert!(!pin.file.contains(['/', '\\', '\0']) && !pin.file.starts_with('.'), "{}", pin.file);
    }
}
