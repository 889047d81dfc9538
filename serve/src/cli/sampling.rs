//! Options of how answers are sampled, which `run` takes and a conversation can change.

use std::{fmt, num::NonZeroUsize, str::FromStr};

use crate::{Result, SamplingParams};

/// How tokens are chosen, and when an answer ends.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// What logits are divided by before one is drawn; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw from the K likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: u32,
    /// Draw from the likeliest tokens that have this much probability together
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Draw from tokens that have this fraction of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// What random numbers begin with, for the same answer again
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Above 1: tokens of the prompt and the answer become less likely
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Above 0: tokens that are in the answer become less likely
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// The same for each time that they are
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// End the answer at this token; may be given several times
    #[arg(long, value_name = "ID")]
    pub stop_token_id: Vec<u32>,
    /// Add this to the logit of a token; may be given several times
    #[arg(long, value_name = "ID=X", value_parser = TokenBias::from_str)]
    pub logit_bias: Vec<TokenBias>,
    /// The most tokens of an answer; 256 by default, and in a conversation as many as there is
    /// room for
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<NonZeroUsize>,
    /// The tokens that an answer has before anything ends it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: usize,
    /// Go on where the model would end its answer
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingArgs {
    /// The parameters of a request, with at most `max_tokens` unless it is said otherwise.
    pub fn params(&self, max_tokens: Option<usize>) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_id.clone(),
            logit_bias: self.logit_bias.iter().map(|bias| (bias.token, bias.bias)).collect(),
            max_tokens: self.max_tokens.map(NonZeroUsize::get).or(max_tokens),
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            ..SamplingParams::default()
        }
    }

    /// Changes an option by its name, as in `temperature 0.7`.
    ///
    /// # Errors
    /// There is no such option, or the value is none of it. Whether a number is in its range is
    /// said when it is used.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let (name, value) = assignment.split_once(char::is_whitespace).unwrap_or((assignment, ""));
        let (name, value) = (name.trim_start_matches('-').replace('-', "_"), value.trim());
        if value.is_empty() {
            return Err(format!("{name} has no value: expected `/set {name} VALUE`").into());
        }
        let done = match name.as_str() {
            "temperature" => parse(value, &mut self.temperature),
            "top_k" => parse(value, &mut self.top_k),
            "top_p" => parse(value, &mut self.top_p),
            "min_p" => parse(value, &mut self.min_p),
            "seed" => parse_option(value, &mut self.seed),
            "repetition_penalty" => parse(value, &mut self.repetition_penalty),
            "presence_penalty" => parse(value, &mut self.presence_penalty),
            "frequency_penalty" => parse(value, &mut self.frequency_penalty),
            "max_tokens" => parse_option(value, &mut self.max_tokens),
            "min_tokens" => parse(value, &mut self.min_tokens),
            "ignore_eos" => parse(value, &mut self.ignore_eos),
            "stop" => parse_list(value, &mut self.stop),
            "stop_token_id" => parse_list(value, &mut self.stop_token_id),
            "logit_bias" => parse_list(value, &mut self.logit_bias),
            _ => {
                return Err(
                    format!("there is no option `{name}`; expected one of those that `/set` shows").into()
                );
            }
        };
        done.map_err(|reason: String| format!("{name} cannot be `{value}`: {reason}").into())
    }

    /// Every option and its value, as [`set`](Self::set) takes it.
    pub fn shown(&self) -> [(&'static str, String); 14] {
        fn or_none<T: ToString>(value: Option<T>) -> String {
            value.map_or_else(|| "none".into(), |value| value.to_string())
        }
        fn listed<T: ToString>(values: &[T]) -> String {
            let values: Vec<_> = values.iter().map(T::to_string).collect();
            if values.is_empty() { "none".into() } else { values.join(" ") }
        }
        [
            ("temperature", self.temperature.to_string()),
            ("top_k", self.top_k.to_string()),
            ("top_p", self.top_p.to_string()),
            ("min_p", self.min_p.to_string()),
            ("seed", or_none(self.seed)),
            ("repetition_penalty", self.repetition_penalty.to_string()),
            ("presence_penalty", self.presence_penalty.to_string()),
            ("frequency_penalty", self.frequency_penalty.to_string()),
            ("stop", if self.stop.is_empty() { "none".into() } else { format!("{:?}", self.stop) }),
            ("stop_token_id", listed(&self.stop_token_id)),
            ("logit_bias", listed(&self.logit_bias)),
            ("max_tokens", or_none(self.max_tokens)),
            ("min_tokens", self.min_tokens.to_string()),
            ("ignore_eos", self.ignore_eos.to_string()),
        ]
    }
}

/// What is added to the logit of a token, as in `7=-100`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenBias {
    token: u32,
    bias: f32,
}

impl FromStr for TokenBias {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('=').and_then(|(token, bias)| {
            Some(Self { token: token.trim().parse().ok()?, bias: bias.trim().parse().ok()? })
        });
        parts
            .ok_or_else(|| format!("expected a token's number and what is added, as in 7=-100, not {text:?}"))
    }
}

impl fmt::Display for TokenBias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.token, self.bias)
    }
}

fn parse<T: FromStr<Err: ToString>>(value: &str, into: &mut T) -> std::result::Result<(), String> {
    *into = value.parse().map_err(|error: T::Err| error.to_string())?;
    Ok(())
}

/// Adds a value to a list, or takes all out.
fn parse_list<T: FromStr<Err: ToString>>(value: &str, into: &mut Vec<T>) -> std::result::Result<(), String> {
    match value {
        "none" => into.clear(),
        value => into.push(value.parse().map_err(|error: T::Err| error.to_string())?),
    }
    Ok(())
}

fn parse_option<T: FromStr<Err: ToString>>(
    value: &str,
    into: &mut Option<T>,
) -> std::result::Result<(), String> {
    *into = match value {
        "none" => None,
        value => Some(value.parse().map_err(|error: T::Err| error.to_string())?),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn args(words: &[&str]) -> SamplingArgs {
        Program::parse_from([&["program"], words].concat()).sampling
    }

    #[test]
    fn every_option_can_be_given_and_set() {
        assert_eq!(args(&[]).params(None), SamplingParams::default());
        let values =
            ["0.5", "7", "0.9", "0.1", "3", "1.5", "-0.5", "0.25", "end", "5", "7=-1.5", "9", "2", "true"];
        let (mut set, mut words) = (args(&[]), Vec::new());
        for ((name, _), value) in args(&[]).shown().into_iter().zip(values) {
            set.set(&format!("{name} {value}")).unwrap();
            words.push(format!("--{}", name.replace('_', "-")));
            words.extend((value != "true").then(|| value.to_owned()));
        }
        let given = args(&words.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(set.shown(), given.shown());
        assert_eq!(set.params(None), given.params(None));
        assert_eq!((given.params(None).frequency_penalty, given.params(Some(1)).max_tokens), (0.25, Some(9)));
        assert_eq!(args(&[]).params(Some(256)).max_tokens, Some(256));
        assert_eq!(given.params(None).logit_bias, [(7, -1.5)].into());
        assert_eq!(given.params(None).stop_token_ids, [5]);
        for name in ["seed", "stop", "stop_token_id", "logit_bias", "max_tokens"] {
            set.set(&format!("{name} none")).unwrap();
        }
        assert_eq!((set.seed, set.stop.len(), set.max_tokens), (None, 0, None));
    }

    #[test]
    fn what_is_no_option_is_refused() {
        for (assignment, want) in [
            ("temperature", "has no value"),
            ("temperature  ", "has no value"),
            ("temperature hot", "cannot be `hot`"),
            ("top_k -1", "cannot be `-1`"),
            ("max-tokens 0", "max_tokens cannot be `0`"),
            ("logit_bias 7", "as in 7=-100"),
            ("stop_token_id -1", "cannot be `-1`"),
            ("heat 1", "no option `heat`"),
            ("", "has no value"),
        ] {
            let mut options = args(&[]);
            let error = options.set(assignment).unwrap_err().to_string();
            assert!(error.contains(want), "{assignment}: {error}");
            assert_eq!(options.shown(), args(&[]).shown());
        }
    }
}
