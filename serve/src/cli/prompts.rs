//! Prompts of a file, one a line.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use crate::Result;

/// A line of a file of prompts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its number, from 1 on.
    pub number: usize,
    /// The prompt, or why it is none.
    pub prompt: std::result::Result<String, String>,
}

/// The lines of a file that are not blank; `-` is the standard input.
///
/// # Errors
/// The file cannot be read, or has none.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let (bytes, name) = match path.as_os_str() == "-" {
        true => {
            let mut bytes = Vec::new();
            (io::stdin().read_to_end(&mut bytes).map(|_| bytes), "the standard input".into())
        }
        false => (fs::read(path), path.display().to_string()),
    };
    let bytes = bytes.map_err(|error| format!("cannot read the prompts from {name}: {error}"))?;
    let lines = lines(&bytes);
    match lines.is_empty() {
        true => Err(format!("{name} has no prompts; expected one a line").into()),
        false => Ok(lines),
    }
}

fn lines(bytes: &[u8]) -> Vec<Line> {
    let line = |(number, line): (usize, &[u8])| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let prompt = match str::from_utf8(line) {
            Ok(line) if line.trim().is_empty() => return None,
            Ok(line) => Ok(line.into()),
            Err(error) => Err(format!("the line is no UTF-8, from its byte {} on", error.valid_up_to() + 1)),
        };
        Some(Line { number, prompt })
    };
    (1..).zip(bytes.split(|&byte| byte == b'\n')).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        let refused = |expected: &str| {
            let text = read(&path).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains(path.to_str().unwrap()), "{text}");
        };
        refused("cannot read the prompts");
        fs::write(&path, "\n \n").unwrap();
        refused("has no prompts");
        fs::write(&path, b"One?\n\n  Two \r\nthr\xe9e\nFour").unwrap();
        let four: Vec<_> = read(&path).unwrap().into_iter().map(|line| (line.number, line.prompt)).collect();
        let broken = "the line is no UTF-8, from its byte 4 on".to_owned();
        assert_eq!(
            four,
            [(1, Ok("One?".into())), (3, Ok("  Two ".into())), (4, Err(broken)), (5, Ok("Four".into()))]
        );
    }
}
