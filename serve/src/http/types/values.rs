//! How many values JSON has.

/// The most values of a request: numbers, strings, lists and others, and names of fields. Each takes up to some hundred
/// bytes of memory once it is read.
pub const MAX_VALUES: usize = 1 << 20;

/// As many values as a JSON text may have, before it is read: one behind each sign that one can follow.
pub fn values(json: &[u8]) -> usize {
    let (mut values, mut in_string, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b':' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}
