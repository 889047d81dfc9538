//! What a line of a conversation is: a command, or something to say.

use crate::Result;

/// A line of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// A question to the model.
    Say(&'a str),
    /// Shows the commands.
    Help,
    /// Ends the program.
    Exit,
    /// Forgets what was said.
    Clear,
    /// Shows the model.
    Show,
    /// Shows the system prompt, or takes another one.
    System(Option<&'a str>),
    /// Shows the options, or changes one.
    Set(Option<&'a str>),
}

/// What `/help` shows.
pub const HELP: &str = "\
/clear              forget what was said
/system [TEXT]      show the system prompt, or take another one (`none` for the model's own)
/set [NAME VALUE]   show the options, or change one; `/set verbose true` shows times
/show               show the model
/help               show this
/exit               end the program, as Ctrl-D does
\"\"\"                 begin and end a text of several lines
Ctrl-C              stop the answer";

/// Reads a line. What begins with `//` is text that begins with `/`.
///
/// # Errors
/// There is no such command, or it takes nothing.
pub fn parse(line: &str) -> Result<Command<'_>> {
    let Some(command) = line.strip_prefix('/') else { return Ok(Command::Say(line)) };
    if command.starts_with('/') {
        return Ok(Command::Say(command));
    }
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = Some(rest.trim()).filter(|rest| !rest.is_empty());
    let plain = |command| match rest {
        None => Ok(command),
        Some(_) => Err(format!("/{name} takes nothing").into()),
    };
    match name {
        "help" | "?" => plain(Command::Help),
        "exit" | "quit" | "bye" => plain(Command::Exit),
        "clear" => plain(Command::Clear),
        "show" => plain(Command::Show),
        "system" => Ok(Command::System(rest)),
        "set" => Ok(Command::Set(rest)),
        _ => Err(format!("there is no command /{name}; /help shows those that there are").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_text() {
        for (line, want) in [
            ("Hi / there", Command::Say("Hi / there")),
            ("//etc/hosts?", Command::Say("/etc/hosts?")),
            ("/?", Command::Help),
            ("/bye", Command::Exit),
            ("/exit ", Command::Exit),
            ("/system", Command::System(None)),
            ("/system  Be brief. ", Command::System(Some("Be brief."))),
            ("/set top_k 3", Command::Set(Some("top_k 3"))),
            ("/set", Command::Set(None)),
            ("/clear", Command::Clear),
            ("/show", Command::Show),
        ] {
            assert_eq!(parse(line).unwrap(), want, "{line}");
        }
        for (line, want) in [
            ("/etc/hosts", "no command /etc/hosts"),
            ("/", "no command /"),
            ("/exit now", "/exit takes nothing"),
        ] {
            assert!(parse(line).unwrap_err().to_string().contains(want), "{line}");
        }
    }
}
