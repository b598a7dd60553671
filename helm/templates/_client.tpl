{{/* What `helm test` and the load test share: they reach the Service, with a key where one is needed, and trust its CA. */}}
{{- define "lowbit.clientFlags" -}}
- {{ printf "--target=%s" (include "lowbit.url" .) | quote }}
{{- if .Values.tls.existingSecret }}
{{- if include "lowbit.caVolume" . }}
- --ca-file=/etc/lowbit/ca/ca.crt
{{- else if .Values.test.insecure }}
- --insecure
{{- end }}
{{- end }}
{{- end -}}

{{- define "lowbit.clientEnv" -}}
{{- with .Values.test.apiKey }}
{{- if .existingSecret }}
- name: LOWBIT_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{- define "lowbit.caMount" -}}
{{- if include "lowbit.caVolume" . }}
- {name: tls-ca, mountPath: /etc/lowbit/ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "lowbit.caVolume" -}}
{{- with .Values.tls.ca }}
{{- if .existingSecret }}
- name: tls-ca
  secret: {secretName: {{ .existingSecret | quote }}, items: [{key: {{ .key | quote }}, path: ca.crt}]}
{{- else if .existingConfigMap }}
- name: tls-ca
  configMap: {name: {{ .existingConfigMap | quote }}, items: [{key: {{ .key | quote }}, path: ca.crt}]}
{{- end }}
{{- end }}
{{- end -}}
