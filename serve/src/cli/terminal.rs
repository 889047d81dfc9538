//! The prompt line of a terminal, with the history of earlier ones.

use std::{fs, path::PathBuf};

use rustyline::{DefaultEditor, error::ReadlineError};

use super::conversation::Input;
use crate::Result;

/// Lines of the history that are kept.
const HISTORY: usize = 1000;

/// A prompt line.
pub struct PromptLine {
    editor: DefaultEditor,
    history: PathBuf,
}

impl PromptLine {
    /// The prompt line, whose history is in a file, which need not exist.
    pub fn new(history: PathBuf) -> Result<Self> {
        let config = rustyline::Config::builder().max_history_size(HISTORY)?.auto_add_history(true).build();
        let mut editor = DefaultEditor::with_config(config)?;
        // There is none yet, or it cannot be read: then it begins anew.
        let _ = editor.load_history(&history);
        Ok(Self { editor, history })
    }

    /// Asks for a line, behind `prompt`.
    pub fn read(&mut self, prompt: &str) -> Result<Input> {
        match self.editor.readline(prompt) {
            Ok(line) => Ok(Input::Line(line)),
            Err(ReadlineError::Interrupted) => Ok(Input::Interrupted),
            Err(ReadlineError::Eof) => Ok(Input::End),
            Err(error) => Err(format!("the terminal cannot be read: {error}").into()),
        }
    }
}

impl Drop for PromptLine {
    fn drop(&mut self) {
        // A history that cannot be kept is no reason to complain at the end.
        let _ = self.history.parent().map(fs::create_dir_all);
        let _ = self.editor.save_history(&self.history);
    }
}
