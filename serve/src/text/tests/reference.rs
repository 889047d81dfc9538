//! Ids beside those of llama.cpp's own tests.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use super::*;

/// Names the folder `models` of llama.cpp's sources, with vocabularies (`ggml-vocab-*.gguf`), texts (`.inp`) and their
/// ids (`.out`).
const FOLDER: &str = "FLASHINFER_RS_TEST_VOCABS";
/// What is behind each text.
const BEHIND: &str = "\n__ggml_vocab_test__\n";
/// Tokenizers that the engine does not have.
const OTHERS: [&str; 2] = ["bert", "gemma4"];

#[test]
fn ids_are_those_of_llama_cpp() {
    let Some(folder) = env::var_os(FOLDER) else {
        return test_support::say(&format!(
            "skipped: {FOLDER} names no folder of llama.cpp's vocabularies and ids"
        ));
    };
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let compared: usize =
        files.filter(|file| with_kind(file, "out").is_file()).map(|file| compare(&file)).sum();
    assert!(compared > 0, "there are no vocabularies with ids");
}

/// The path with a further ending.
fn with_kind(file: &Path, kind: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{kind}"));
    name.into()
}

/// Compares the ids of all texts beside a vocabulary; how many there are.
fn compare(file: &Path) -> usize {
    let content = Content::read(&mut fs::File::open(file).unwrap()).unwrap();
    let text = match Text::from_gguf(&content) {
        Ok(text) => text,
        Err(error) => {
            let told = error.to_string();
            assert!(OTHERS.iter().any(|other| told.contains(&format!("`{other}`"))), "{file:?}: {told}");
            return 0;
        }
    };
    let [inputs, ids] = ["inp", "out"].map(|kind| fs::read_to_string(with_kind(file, kind)).unwrap());
    let (inputs, ids): (Vec<_>, Vec<_>) = (inputs.split_terminator(BEHIND).collect(), ids.lines().collect());
    assert_eq!(inputs.len(), ids.len(), "{file:?}");
    for (input, ids) in inputs.iter().zip(ids) {
        let want: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let got = text.encode_with(input, &EncodeOptions { bos: false, ..EncodeOptions::default() });
        assert_eq!(got, want, "{file:?}: {input:?}");
    }
    eprintln!("{file:?}: {} texts have llama.cpp's ids", inputs.len());
    inputs.len()
}
