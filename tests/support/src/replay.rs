//! The seeds of fuzzing, and mutations of them, on any toolchain and in bounded time. What a fuzzer
//! finds with a program that tells it of branches, this does not; it keeps what was mended mended.

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{Rng, say};

/// No input may take longer, in a program without optimization on a machine that is busy.
const MOST: Duration = Duration::from_secs(20);
/// A mutation has at most so many more bytes than its seeds.
const MOST_ADDED: usize = 64;

/// Gives `target` each file of a folder, and that many mutations of them in all.
///
/// # Panics
/// `target` panics or takes too long: the input, and the file that holds it, are named.
pub fn replay(folder: impl AsRef<Path>, mutations: usize, target: impl Fn(&[u8])) {
    let folder = folder.as_ref();
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let seeds: Vec<_> = files.iter().map(|file| fs::read(file).expect("a seed")).collect();
    assert!(!seeds.is_empty(), "{} has no seeds", folder.display());
    for seed in &seeds {
        run(folder, seed, &target);
    }
    let mut rng = Rng::new();
    for _ in 0..mutations {
        run(folder, &mutation(&mut rng, &seeds), &target);
    }
}

fn run(folder: &Path, input: &[u8], target: &impl Fn(&[u8])) {
    let start = Instant::now();
    let done = panic::catch_unwind(AssertUnwindSafe(|| target(input)));
    let took = start.elapsed();
    if done.is_ok() && took < MOST {
        return;
    }
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let file = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    let _ = fs::write(&file, input);
    say(&format!("{name}: after {took:?}, the input is {}", file.display()));
    match done {
        Err(panicked) => panic::resume_unwind(panicked),
        Ok(()) => panic!("{name}: an input took {took:?}"),
    }
}

/// Some changes of a seed.
fn mutation(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    const ODD: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'\\', b'{', b'<', b',', b'/', b'.'];
    let mut bytes = seeds[rng.below(seeds.len())].clone();
    let most = bytes.len() + MOST_ADDED;
    for _ in 0..=rng.below(4) {
        let at = rng.below(bytes.len() + 1);
        let to = at + rng.below((bytes.len() - at).min(16) + 1);
        match rng.below(7) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..to)),
            2 => bytes[at..to].iter_mut().for_each(|byte| *byte = rng.bits() as u8),
            3 => bytes[at..to].fill(ODD[rng.below(ODD.len())]),
            4 => bytes.insert(at, ODD[rng.below(ODD.len())]),
            // A part again.
            5 => drop(bytes.splice(at..at, bytes[at..to].to_vec())),
            // A part of another one.
            _ => {
                let other = &seeds[rng.below(seeds.len())];
                let from = rng.below(other.len() + 1);
                let part = &other[from..from + rng.below((other.len() - from).min(MOST_ADDED) + 1)];
                drop(bytes.splice(at..to, part.iter().copied()));
            }
        }
    }
    bytes.truncate(most);
    bytes
}
