//! Members of a pinned wheel that is not downloaded: read from its server by HTTP ranges.
//!
//! With the digest of its `RECORD` pinned, a wheel need not be had whole to be trusted. The end
//! of the file tells where the central directory is, the directory where the members are, and
//! the RECORD, once it has the pinned digest, what each of them must be. The zip reader is the one
//! that reads wheels on disk; it reads here from [`Remote`], a file that asks a server for what is
//! not at hand.
//!
//! A request asks for at least [`AHEAD`] bytes, and for more where reading goes on. Once the
//! directory is known, it ends where the next member begins, so that little is asked for in vain;
//! a large member comes in blocks of [`BLOCK`], the only memory that a download takes. A request
//! that breaks goes on where it broke, with the patience of any other download.
//!
//! Nothing that a server says is trusted: not the directory, whose offsets and sizes only lead to
//! bytes that have a member's digest or are refused; not the answers, which must be the range that
//! was asked for. A server without ranges is told apart from one that cannot be reached or that
//! sends something else: only the first is a reason to download the wheel whole.

use super::download::{MAX_WHEEL, failed};
use super::http::{Address, Broken, Client, Patience, content_range};
use super::pins::Pin;
use super::sink::Sink;
use super::wheel::{self, Wheel};
use super::{ArtifactError, Digest, FetchOptions, Member, Progress, ProgressFn};
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use ureq::http::StatusCode;

/// The smallest request, and what of the file's end is kept: more than the longest comment of a
/// zip archive.
const AHEAD: u64 = 96 << 10;
/// The smallest one for members.
const LEAST: u64 = 16 << 10;
/// The largest request.
const BLOCK: u64 = 8 << 20;
/// No wheel's central directory is larger.
const MAX_DIRECTORY: u64 = 64 << 20;

/// Why a member cannot be had from a server.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The server does not answer ranges: the wheel must be downloaded whole.
    NoRanges,
    /// Anything else.
    Failed(ArtifactError),
}

/// A pinned wheel at its address.
pub(crate) struct RemoteWheel {
    archive: zip::ZipArchive<Remote>,
    shared: Arc<Shared>,
    wheel: Wheel,
    record: Vec<u8>,
}

impl RemoteWheel {
    /// Reads the central directory and the RECORD, which must have the digest `record_sha256`.
    pub(crate) fn open(
        pin: &Pin,
        record_sha256: Digest,
        address: Address,
        options: &FetchOptions,
        progress: Option<ProgressFn>,
    ) -> Result<RemoteWheel, Trouble> {
        let shown = address.shown();
        let path = Path::new(&shown);
        let remote = Remote::open(pin, address, options, progress)?;
        let shared = Arc::clone(&remote.shared);
        let mut archive = wheel::archive(path, remote).map_err(|e| shared.cause(e))?;
        let mut bounds = vec![archive.central_directory_start()];
        for index in 0..archive.len() {
            bounds.extend(archive.by_index_data(index).map(|entry| entry.header_start()));
        }
        bounds.sort_unstable();
        let _ = shared.bounds.set(bounds);
        let read = Wheel::read(path, &mut archive, Some(record_sha256));
        let (wheel, record) = read.map_err(|e| shared.cause(e))?;
        Ok(RemoteWheel { archive, shared, wheel, record })
    }

    /// The wheel's RECORD.
    pub(crate) fn record(&self) -> &[u8] {
        &self.record
    }

    /// Streams a member into `sink`.
    pub(crate) fn copy(&mut self, member: &Member, sink: &mut Sink) -> Result<(), ArtifactError> {
        let lost = || format!("{member} is in RECORD and not in the central directory");
        let recorded = self.wheel.find(member)?;
        let recorded = recorded.ok_or_else(|| ArtifactError::wheel(self.wheel.path(), lost()))?;
        self.wheel.copy_from(&mut self.archive, recorded, sink)
    }

    /// What is behind an error of [`RemoteWheel::copy`]: the server's failure, if it failed.
    pub(crate) fn cause(&self, error: ArtifactError) -> Trouble {
        self.shared.cause(error)
    }
}

impl fmt::Debug for RemoteWheel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteWheel").field("path", &self.wheel.path()).finish_non_exhaustive()
    }
}

/// What the zip reader, which owns the file, has no words for.
#[derive(Default)]
struct Shared {
    /// Where members begin, sorted, and where the last ends.
    bounds: OnceLock<Vec<u64>>,
    trouble: Mutex<Option<Trouble>>,
}

impl Shared {
    /// The reader's error, or the server's failure that it came from.
    fn cause(&self, error: ArtifactError) -> Trouble {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        trouble.unwrap_or(Trouble::Failed(error))
    }
}

/// Bytes of the file that are at hand.
#[derive(Default)]
struct Block {
    start: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn from(&self, position: u64) -> Option<&[u8]> {
        let at = usize::try_from(position.checked_sub(self.start)?).ok()?;
        self.bytes.get(at..).filter(|bytes| !bytes.is_empty())
    }
}

/// A file on a server.
struct Remote {
    pin: Pin,
    address: Address,
    client: Client,
    options: FetchOptions,
    progress: Option<ProgressFn>,
    shared: Arc<Shared>,
    total: u64,
    position: u64,
    tail: Block,
    block: Block,
    /// The size of the next request where nothing else bounds it.
    ahead: u64,
    /// The bytes that have come.
    moved: u64,
}

impl Remote {
    fn open(
        pin: &Pin,
        address: Address,
        options: &FetchOptions,
        progress: Option<ProgressFn>,
    ) -> Result<Remote, Trouble> {
        let mut remote = Remote {
            pin: pin.clone(),
            address,
            client: Client::new(options),
            options: options.clone(),
            progress,
            shared: Arc::default(),
            total: 0,
            position: 0,
            tail: Block::default(),
            block: Block::default(),
            ahead: AHEAD,
            moved: 0,
        };
        remote.on_progress(&Progress::Started { file: &pin.file, done: 0, total: None });
        // The first byte, for the size: not every server that answers ranges knows "the last n".
        remote.get(0..1)?;
        remote.tail = remote.get(remote.total.saturating_sub(AHEAD)..remote.total)?;
        remote.check_directory()?;
        Ok(remote)
    }

    /// Refuses a zip64 directory that is too large by its own account: the zip reader makes room
    /// for all its entries before it reads the first. No other directory has more than 65 535.
    fn check_directory(&self) -> Result<(), Trouble> {
        let number = |at| Some(u64::from_le_bytes(self.tail.from(at)?.get(..8)?.try_into().ok()?));
        for (at, bytes) in (self.tail.start..).zip(self.tail.bytes.windows(24)) {
            // The place of the zip64 end, directly before the end that every archive has.
            if bytes.starts_with(b"PK\x06\x07") && bytes.ends_with(b"PK\x05\x06") {
                let size = number(at + 8).and_then(|end: u64| number(end.checked_add(40)?));
                if size.is_none_or(|size| size > MAX_DIRECTORY) {
                    return Err(self.too_large());
                }
            }
        }
        Ok(())
    }

    fn too_large(&self) -> Trouble {
        let reason = format!("its central directory has more than {MAX_DIRECTORY} bytes");
        Trouble::Failed(ArtifactError::wheel(self.address.shown().as_ref(), reason))
    }

    fn on_progress(&self, progress: &Progress<'_>) {
        if let Some(on_progress) = &self.progress {
            on_progress(progress);
        }
    }

    /// Gets the block that begins at the current position.
    fn load(&mut self) -> Result<(), Trouble> {
        let at = self.position;
        let end = match self.shared.bounds.get() {
            Some(bounds) => {
                let next = bounds.get(bounds.partition_point(|bound| *bound <= at));
                // Bounds are the server's word, too, and may lie close together.
                next.copied().unwrap_or(self.total).clamp(at + LEAST, at + BLOCK)
            }
            None if self.moved > MAX_DIRECTORY => {
                return Err(self.too_large());
            }
            None => {
                self.ahead = if at == self.block.end() { (self.ahead * 2).min(BLOCK) } else { AHEAD };
                at + self.ahead
            }
        };
        // Given back before the next one is there.
        self.block = Block { start: at, bytes: Vec::new() };
        self.block = self.get(at..end.min(self.tail.start))?;
        Ok(())
    }

    /// A range of the file, in as many requests as it takes.
    fn get(&mut self, range: Range<u64>) -> Result<Block, Trouble> {
        let size = range.end.saturating_sub(range.start).min(BLOCK) as usize;
        let mut block = Block { start: range.start, bytes: Vec::with_capacity(size) };
        let options = self.options.clone();
        let mut patience = Patience::new(&options);
        while block.end() < range.end {
            let before = block.end();
            let broken = match self.request(&mut block, range.end) {
                Ok(Some(NoRanges)) => return Err(Trouble::NoRanges),
                Ok(None) if block.end() == range.end => break,
                Ok(None) => Broken::Passing("the server sends less than it is asked for".into()),
                Err(broken) => broken,
            };
            if patience.gain(block.end() - before) {
                continue;
            }
            let failed = |reason| failed(&self.pin.file, &self.address, reason);
            patience.pause(broken, failed).map_err(Trouble::Failed)?;
        }
        Ok(block)
    }

    /// One request, appended to what is there.
    fn request(&mut self, block: &mut Block, end: u64) -> Result<Option<NoRanges>, Broken> {
        let from = block.end();
        let range = format!("bytes={from}-{}", end - 1);
        let response = self.client.ask(&self.address, Some(range))?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(Some(NoRanges));
        }
        let Some((range, Some(total))) = content_range(&response) else { return Ok(Some(NoRanges)) };
        if self.total == 0 && total <= MAX_WHEEL {
            self.total = total;
        }
        // A server may send less than it was asked for.
        if total != self.total || *range.start() != from || range.is_empty() || *range.end() >= end {
            return Ok(Some(NoRanges));
        }
        let want = range.end() + 1 - from;
        let exact = response.body().content_length() == Some(want);
        let mut body = response.into_body();
        let mut buffer = vec![0; 1 << 16];
        while block.end() < from + want {
            let left = (from + want - block.end()).min(buffer.len() as u64) as usize;
            let n = match body.read(&mut buffer[..left]) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Broken::Passing(e.to_string())),
            };
            if n == 0 {
                let come = block.end() - from;
                return Err(Broken::Passing(format!("the connection ended after {come} of {want} bytes")));
            }
            block.bytes.extend_from_slice(&buffer[..n]);
            self.moved += n as u64;
            self.on_progress(&Progress::Bytes { file: &self.pin.file, done: self.moved, total: None });
        }
        if exact {
            // Only a body that was read to its end leaves the connection to the next request.
            let _ = body.read(&mut buffer);
        }
        Ok(None)
    }
}

/// The answer of a server that does not send the range that it was asked for.
struct NoRanges;

impl Read for Remote {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.position >= self.total {
            return Ok(0);
        }
        if self.position < self.tail.start
            && self.block.from(self.position).is_none()
            && let Err(trouble) = self.load()
        {
            *self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble);
            return Err(io::Error::other("the server failed"));
        }
        let block = if self.position < self.tail.start { &self.block } else { &self.tail };
        let at_hand = block.from(self.position).unwrap_or_default();
        let n = at_hand.len().min(buffer.len());
        buffer[..n].copy_from_slice(&at_hand[..n]);
        self.position += n as u64;
        Ok(n)
    }
}

impl Seek for Remote {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.total.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
