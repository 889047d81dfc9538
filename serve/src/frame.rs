//! Messages on a connection: a kind, a length, and as many bytes.

use std::io::{self, ErrorKind, Read, Write};

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The other side lives.
    Alive,
    /// For who waits for messages.
    Message,
    /// The other side cannot go on; why, in UTF-8.
    Failed,
    /// Nothing comes any more.
    Done,
}

/// The longest message, in bytes. A step of a million pages is well below.
const LONGEST: u32 = 1 << 28;
/// What is allocated before it is there.
const AT_ONCE: u64 = 1 << 20;

impl Kind {
    const ALL: [Self; 4] = [Self::Alive, Self::Message, Self::Failed, Self::Done];
}

/// Writes a message, in one piece.
pub fn write(connection: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let len = u32::try_from(bytes.len()).ok().filter(|&len| len <= LONGEST);
    let len = len.ok_or_else(|| too_long(bytes.len() as u64))?;
    let mut frame = Vec::with_capacity(bytes.len() + 5);
    frame.push(kind as u8);
    frame.extend(len.to_le_bytes());
    frame.extend(bytes);
    connection.write_all(&frame)
}

/// Reads a message of up to `longest` bytes.
pub fn read(connection: &mut impl Read, longest: u32) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 5];
    connection.read_exact(&mut head)?;
    let [kind, len @ ..] = head;
    let Some(&kind) = Kind::ALL.get(usize::from(kind)) else {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a message of kind {kind}")));
    };
    let len = u32::from_le_bytes(len);
    if len > longest.min(LONGEST) {
        return Err(too_long(len.into()));
    }
    let mut bytes = Vec::with_capacity(u64::from(len).min(AT_ONCE) as usize);
    match connection.take(len.into()).read_to_end(&mut bytes)? == len as usize {
        true => Ok((kind, bytes)),
        false => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// As [`read`], of any length that is written.
pub fn read_any(connection: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    read(connection, LONGEST)
}

fn too_long(len: u64) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("a message of {len} bytes; expected up to {LONGEST}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_were_sent() {
        let mut bytes = Vec::new();
        let messages = [(Kind::Alive, vec![]), (Kind::Message, vec![7; 3_000_000]), (Kind::Done, vec![1])];
        for (kind, message) in &messages {
            write(&mut bytes, *kind, message).unwrap();
        }
        let mut left = &bytes[..];
        for message in &messages {
            assert_eq!(read_any(&mut left).unwrap(), *message);
        }
        assert_eq!(read_any(&mut left).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let problem = |mut bytes: &[u8]| read(&mut bytes, 4).unwrap_err().to_string();
        assert!(problem(b"GET / HTTP/1.1").contains("kind 71"));
        assert!(problem(&[1, 255, 255, 255, 255]).contains("4294967295 bytes"));
        assert!(problem(&[1, 5, 0, 0, 0, 1, 2, 3, 4, 5]).contains("a message of 5 bytes"));
        // It ends before all is there.
        for end in 0..8 {
            let bytes = &[1, 3, 0, 0, 0, 1, 2, 3][..end];
            assert_eq!(read(&mut &bytes[..], 4).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }
}
