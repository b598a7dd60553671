{{/* Every LOWBIT_ variable of the server: `server`, flag by flag, and what follows from other values. */}}
{{- define "lowbit.settings" -}}
LOWBIT_DIR: {{ list "/checkpoint" .Values.checkpoint.path | compact | join "/" | quote }}
LOWBIT_PORT: "8000"
LOWBIT_TENSOR_PARALLEL_SIZE: {{ include "lowbit.tensorSize" . | quote }}
LOWBIT_PIPELINE_PARALLEL_SIZE: {{ include "lowbit.pipelineSize" . | quote }}
{{- if include "lowbit.multiNode" . }}
LOWBIT_NNODES: {{ int .Values.parallel.nodes | quote }}
LOWBIT_MASTER_PORT: "29501"
{{- end }}
{{- if include "lowbit.keysSecret" . }}
LOWBIT_API_KEYS: {{ printf "/etc/lowbit/keys/%s" (ternary "keys.yaml" .Values.apiKeys.key (gt (len .Values.apiKeys.entries) 0)) | quote }}
{{- end }}
{{- if .Values.tls.existingSecret }}
LOWBIT_SSL_CERTFILE: {{ printf "/etc/lowbit/tls/%s" .Values.tls.certKey | quote }}
LOWBIT_SSL_KEYFILE: {{ printf "/etc/lowbit/tls/%s" .Values.tls.privateKeyKey | quote }}
{{- end }}
{{- range $name, $value := .Values.server }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "") (and (kindIs "slice" $value) (not $value))) }}
LOWBIT_{{ snakecase $name | upper }}: {{ include "lowbit.setting" $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Numbers of YAML are floats in Helm: 1048576 must not become 1.048576e+06. */}}
{{- define "lowbit.setting" -}}
{{- if kindIs "slice" . -}}
{{- join "," . -}}
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}
