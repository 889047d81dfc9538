//! Fields that others know and this server does not.

use serde_json::{Value, json};

use crate::http::error::ApiError;

/// Checks a field that has no effect here, and returns whether it is known elsewhere.
///
/// # Errors
/// It is, and asks for something: its value is not the one by default.
pub fn check(name: &str, value: &Value) -> Result<bool, ApiError> {
    let Some(defaults) = defaults(name) else { return Ok(false) };
    let Value::Array(defaults) = defaults else { return Ok(true) };
    if value.is_null() || defaults.contains(value) {
        return Ok(true);
    }
    let expected = match defaults.first() {
        Some(default) => format!("expected {default}, or nothing"),
        None => "leave it out".into(),
    };
    Err(ApiError::unsupported(name, format!("{name} is not supported; {expected}")))
}

/// The values of a known field that ask for nothing; null instead of an array if none does
/// anything to an answer.
fn defaults(name: &str) -> Option<Value> {
    Some(match name {
        // OpenAI's.
        "audio" | "prediction" | "web_search_options" | "suffix" => json!([]),
        "best_of" => json!([1]),
        "function_call" => json!(["none", "auto"]),
        "functions" => json!([[]]),
        "modalities" => json!([["text"]]),
        "store" => json!([false]),
        "verbosity" => json!(["medium"]),
        "metadata"
        | "service_tier"
        | "safety_identifier"
        | "prompt_cache_key"
        | "prompt_cache_retention"
        | "user" => Value::Null,
        // vLLM's.
        "add_special_tokens"
        | "include_stop_str_in_output"
        | "return_tokens_as_token_ids"
        | "use_beam_search" => json!([false]),
        "allowed_token_ids"
        | "cache_salt"
        | "chat_template"
        | "guided_choice"
        | "guided_grammar"
        | "guided_json"
        | "guided_regex"
        | "kv_transfer_params"
        | "logits_processors"
        | "media_io_kwargs"
        | "mm_processor_kwargs"
        | "prompt_embeds"
        | "prompt_logprobs"
        | "structured_outputs"
        | "structural_tag"
        | "thinking_token_budget"
        | "truncate_prompt_tokens"
        | "vllm_xargs" => json!([]),
        "bad_words" | "documents" => json!([[]]),
        "include_reasoning" | "skip_special_tokens" | "spaces_between_special_tokens" => json!([true]),
        "length_penalty" => json!([1.0, 1]),
        "priority" => json!([0]),
        "guided_decoding_backend" | "guided_whitespace_pattern" | "request_id" => Value::Null,
        _ => return None,
    })
}
