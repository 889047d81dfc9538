//! As much of an HTTP client as the tests need.

use std::{
    io::{BufRead, BufReader, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::Value;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        serde_json::from_str(&self.body).unwrap()
    }

    /// The JSON of an answer that has no error.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// The error of an answer with this status.
    #[track_caller]
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let error = self.json()["error"].clone();
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        error
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// Asks once, on a connection of its own. A body is JSON, unless a header says otherwise.
pub fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&str>,
) -> Response {
    let mut stream = connect(address);
    let head = head(method, path, headers, body.map(str::len));
    // The server may answer and close before it has read all.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.unwrap_or("").as_bytes()));
    read(&mut BufReader::new(stream))
}

/// Sends these bytes, and takes what is answered.
pub fn send_raw(address: SocketAddr, bytes: &[u8]) -> Response {
    let mut stream = connect(address);
    stream.write_all(bytes).unwrap();
    read(&mut BufReader::new(stream))
}

fn head(method: &str, path: &str, headers: &[(&str, &str)], len: Option<usize>) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    let json = !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    if let Some(len) = len {
        head += &format!("Content-Length: {len}\r\n");
        head += if json { "Content-Type: application/json\r\n" } else { "" };
    }
    for (name, value) in headers.iter().filter(|(_, value)| !value.is_empty()) {
        head += &format!("{name}: {value}\r\n");
    }
    head + "\r\n"
}

fn read_head(reader: &mut impl BufRead) -> Response {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Response { status, headers, body: String::new() }
}

fn read(reader: &mut impl BufRead) -> Response {
    let mut response = read_head(reader);
    let mut body = Vec::new();
    match response.header("transfer-encoding") {
        Some("chunked") => {
            while let Some(chunk) = read_chunk(reader) {
                body.extend(chunk);
            }
        }
        _ => drop(reader.read_to_end(&mut body)),
    }
    response.body = String::from_utf8(body).unwrap();
    response
}

/// A chunk of a body; `None` at its end, and where it breaks off.
fn read_chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let len = usize::from_str_radix(line.trim_end(), 16).ok()?;
    let mut chunk = vec![0; len + 2];
    reader.read_exact(&mut chunk).ok()?;
    chunk.truncate(len);
    (len > 0).then_some(chunk)
}

/// Asks, and waits for nothing.
pub fn ask(address: SocketAddr, path: &str, headers: &[(&str, &str)], body: &Value) -> TcpStream {
    let (mut stream, body) = (connect(address), body.to_string());
    stream.write_all((head("POST", path, headers, Some(body.len())) + &body).as_bytes()).unwrap();
    stream
}

/// An answer that comes as server-sent events.
pub struct Stream {
    pub head: Response,
    reader: BufReader<TcpStream>,
    text: String,
}

impl Stream {
    pub fn open(address: SocketAddr, path: &str, body: &Value) -> Self {
        Self::open_with(address, path, &[], body)
    }

    /// With further headers.
    pub fn open_with(address: SocketAddr, path: &str, headers: &[(&str, &str)], body: &Value) -> Self {
        let mut reader = BufReader::new(ask(address, path, headers, body));
        Self { head: read_head(&mut reader), reader, text: String::new() }
    }

    /// The next event or comment as it is, without the empty line behind it.
    pub fn next_raw(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.text = rest;
                return Some(event);
            }
            self.text += &String::from_utf8(read_chunk(&mut self.reader)?).unwrap();
        }
    }

    /// The next event's data.
    pub fn next_data(&mut self) -> Option<String> {
        loop {
            let event = self.next_raw()?;
            match event.strip_prefix("data: ") {
                Some(data) => return Some(data.to_owned()),
                None => assert!(event.starts_with(':'), "{event}"),
            }
        }
    }

    /// The chunks of a whole stream, which ends as it should.
    pub fn chunks(mut self) -> Vec<Value> {
        assert_eq!(self.head.status, 200);
        assert_eq!(self.head.header("content-type"), Some("text/event-stream"));
        let mut chunks = Vec::new();
        loop {
            let data = self.next_data().expect("a stream that ends with [DONE]");
            if data == "[DONE]" {
                assert_eq!(self.next_raw(), None);
                return chunks;
            }
            chunks.push(serde_json::from_str(&data).unwrap());
        }
    }

    /// Leaves.
    pub fn leave(self) {
        let _ = self.reader.get_ref().shutdown(Shutdown::Both);
    }
}
